"""Sources of batches: text from files, tokenised, mixed, packed."""
