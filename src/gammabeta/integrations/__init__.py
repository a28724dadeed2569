"""Exact statistics at the right moment in other people's training loops.

``gammabeta.integrations.lightning``, ``.transformers`` and ``.ignite``: each needs the package that it is
named after, and nothing else in gammabeta imports it.
"""
