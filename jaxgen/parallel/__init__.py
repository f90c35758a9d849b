"""Models on several devices, and programs on several machines."""
