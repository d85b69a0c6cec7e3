"""Text to batches: corpora, tokenizer, prepared shards, packing, and a loader that resumes exactly."""
