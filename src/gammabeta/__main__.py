"""``python -m gammabeta``: the command line."""

from .cli import main

main()
