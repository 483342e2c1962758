"""One trainer for pre-training, search and fine-tuning, with its objectives and checkpoints."""
