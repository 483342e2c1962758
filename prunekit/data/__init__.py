"""Captioned images: what a method calibrates on, what the trainer trains on, what the evaluation compares with."""
