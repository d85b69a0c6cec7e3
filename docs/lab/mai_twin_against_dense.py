"""The twin of MAI-Base-1 against its dense control: equal active parameters, equal tokens, three paired seeds.

    python docs/lab/mai_twin_against_dense.py runs/lab-mai      # about 12 minutes on two cores; resumes when stopped
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from sextant.lab import paired
from sextant.recipes import mai_base_1
from sextant.train.loop import to_stderr

if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs, the table and the plot")
    out = parser.parse_args().out
    runs = [mai_base_1.twin().replace(eval_every=100), mai_base_1.dense_control().replace(eval_every=100)]
    arms = paired.compare(runs, range(3), out, to_stderr)
    print(paired.table(arms))
