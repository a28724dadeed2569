"""Models with nothing wrong in them, own ones and other libraries'. The doctor is to be silent."""
