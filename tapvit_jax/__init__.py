"""Task-adaptive pruning of vision transformers for many devices."""
