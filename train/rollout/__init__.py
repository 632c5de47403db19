"""Sources that look at the current parameters: answers are sampled, verified and made into batches."""
