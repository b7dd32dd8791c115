"""Training, fine-tuning, evaluation and checkpoints."""
