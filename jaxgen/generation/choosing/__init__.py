"""One token: the draw, its key, and whether the row ends with it."""
