"""Records of generations: what determined the tokens, and running it again."""
