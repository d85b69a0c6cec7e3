"""Numbers as people write and read them: ``32k``, ``8Ki``, ``962.15 B``, ``1.9 GiB``, ``3m42s``."""

from __future__ import annotations

import math
import re

from sextant.core.errors import UsageError

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "K": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SIZE = re.compile(r"^(\d[\d_]*(?:\.\d+)?(?:e\d+)?)(k|m|b|t|K|Ki|Mi|Gi)?$")


def parse_size(text: str) -> int:
    """``32k`` is 32,000; ``32K`` and ``32Ki`` are 32,768; ``1e9`` and ``10_000`` are what they say.

    Raises:
        UsageError: the text is no whole number in any of these forms.
    """
    match = _SIZE.match(text.strip())
    value = float(match[1].replace("_", "")) * _SCALE[match[2] or ""] if match else 0.5
    if not math.isfinite(value) or value != int(value):
        raise UsageError("not a size", got=repr(text), expected="a whole number such as 4096, 32k, 32Ki or 1e9")
    return int(value)


def count(n: float, digits: int = 2) -> str:
    """``962.15 B`` for 962,150,000,000: decimal units, as parameter counts are published."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.{digits}f} {unit}"
    return f"{n:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{n:.0f}"


def size(n: float) -> str:
    """``1.9 GiB``: binary units, as memory is sold."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{int(n)} B"


def duration(seconds: float) -> str:
    """``3m42s``, ``2h05m``, ``41s``; ``-`` when the time is not known or makes no sense."""
    if not 0 <= seconds < 10**9:
        return "-"
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
