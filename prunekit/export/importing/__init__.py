"""Importing checkpoints of other code: the APTP authors' releases."""
