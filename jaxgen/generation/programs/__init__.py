"""What is compiled: the two executables, their static half and their numbers, and a model as they take it."""
