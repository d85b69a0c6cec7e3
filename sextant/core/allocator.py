"""Keep freed memory: the C library hands large blocks back to the kernel, and a training step asks for the same again.

Each time every page is faulted in and zeroed anew: thousands of faults a step, about a fifth of the time of a small
model on two cores (``bench/peers_cpu.py`` shows both sides).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # more is refused on 64-bit systems


def keep_freed_memory(limit: int = 1 << 30) -> bool:
    """Let this process keep up to ``limit`` freed bytes; only with glibc, elsewhere nothing happens.

    Returns:
        Whether the C library took both settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, limit))
