"""`python -m qinfer`: the command line."""

from .cli import main

main()
