"""How the embedded models and data were made."""
