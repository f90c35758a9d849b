"""Where token ids become text: tokenizers and streaming."""
