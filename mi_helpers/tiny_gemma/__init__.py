"""tiny-gemma: its training and what it can do."""
