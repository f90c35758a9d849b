"""Outside references: what transformers on torch computes, committed, with the script that made it."""
