"""Batch normalization compiled for the machine it runs on; ``backend`` says what a backend is."""
