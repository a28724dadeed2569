"""Recipes, the network, the training loop and the run folder it leaves behind."""
