"""Captioned images, for calibrating methods, for training, and as the evaluation's reference."""
