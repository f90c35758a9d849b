"""Text generation: one compiled prefill, one compiled decode loop, and what surrounds them."""
