"""Freed memory stays with the process: a large block that comes and goes stops faulting."""

import platform
import subprocess
import sys

from sextant.core.allocator import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from sextant.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
sizes = [(3 + i % 5) << 18 for i in range(40)]
for size in 2 * sizes:
    [torch.ones(size) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in sizes:
    [torch.ones(size) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True, text=True).stdout)


def test_blocks_that_come_and_go_stop_faulting():
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    assert faults("keep") < faults("plain") / 4
