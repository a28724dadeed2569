"""Batch statistics of a model: exact ones from data, and their preservation."""
