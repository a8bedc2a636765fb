"""python -m tinylora.cli"""

from tinylora.cli import main

main()
