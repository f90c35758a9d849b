"""What a text must look like: patterns, and the automata over bytes that they stand for, which know of no tokens."""
