"""What is wrong with the batch normalization in a model, and how to mend it."""
