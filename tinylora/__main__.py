"""`python -m tinylora`: the command line, where its script is not on the path."""

from tinylora.cli import main

main()
