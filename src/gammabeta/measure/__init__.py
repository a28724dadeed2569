"""What is to be gained on a user's own model: ``gammabeta.benchmark``; and timing in interleaved rounds."""
