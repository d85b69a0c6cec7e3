"""Draw recorded terminal output as a picture.

    sextant demo 2>&1 | tee demo.txt; python docs/pictures/terminal.py demo.txt docs/pictures/demo-terminal.png
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from matplotlib.figure import Figure

WIDTH, LINE, CHARACTER = 150, 0.165, 0.078


def main(source: str, target: str) -> None:
    lines = [line[:WIDTH] for line in Path(source).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(WIDTH * CHARACTER, LINE * len(lines)), facecolor="#16181d")
    figure.text(
        0.01, 0.99, "\n".join(lines), family="monospace", fontsize=8.5, color="#d8dee9", va="top", linespacing=1.35,
        parse_math=False,
    )
    figure.savefig(target, dpi=100, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="text, as the terminal showed it")
    parser.add_argument("target", help="PNG to write")
    asked = parser.parse_args()
    main(asked.source, asked.target)
