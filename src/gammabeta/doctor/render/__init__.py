"""A report as text for a terminal, as an HTML page and as plots."""
