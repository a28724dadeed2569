"""What a model is made of: its layers, their hooks, and what follows what."""
