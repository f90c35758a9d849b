"""What is told: the layout of the result, scores, attentions."""
