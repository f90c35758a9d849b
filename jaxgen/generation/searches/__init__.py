"""How a row's tokens are chosen: one after the other, among beams, or with drafts."""
