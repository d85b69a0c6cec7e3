"""``python -m sextant`` is the command ``sextant``."""

from sextant.cli import main

main()
