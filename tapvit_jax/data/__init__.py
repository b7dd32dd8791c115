"""Images, batches, and who owns which image."""
