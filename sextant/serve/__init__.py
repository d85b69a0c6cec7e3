"""Using a model: sampling, text out of tokens, batched decoding."""
