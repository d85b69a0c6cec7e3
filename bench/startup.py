"""How long a person waits for ``sextant --help`` and ``import sextant``: medians of fresh processes.

    python bench/startup.py [--out bench/results/startup.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "sextant --help": [sys.executable, "-m", "sextant", "--help"],
    "import sextant": [sys.executable, "-c", "import sextant"],
    "python alone": [sys.executable, "-c", "pass"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    medians = {name: statistics.median(seconds(command) for _ in range(9)) for name, command in COMMANDS.items()}
    for name, value in medians.items():
        print(f"{name:16} {value:.3f} s")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
