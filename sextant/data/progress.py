"""A line of progress on stderr: live on a terminal, every few seconds in a log, silent when asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from sextant.core import units
from sextant.data.corpus import Document

_EVERY = 10.0  # seconds between lines in a log


class Progress:
    """What was read so far and how fast; with a total also how long it may still take."""

    def __init__(self, task: str, total: int | None = None, quiet: bool = False):
        self._task, self._total, self._quiet = task, total, quiet
        self._documents, self._bytes = 0, 0
        self._began = self._said = time.monotonic()
        self._live = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._live = Console(stderr=True).status(f"{self._task} ...")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, counted as they pass."""
        for document in documents:
            self.add(document.size)
            yield document

    def add(self, size: int) -> None:
        """One more document of ``size`` bytes."""
        self._documents, self._bytes = self._documents + 1, self._bytes + size
        now = time.monotonic()
        if self._live is not None:
            if now - self._said > 0.1:
                self._said = now
                self._live.update(self.line(now))
        elif not self._quiet and now - self._said > _EVERY:
            self._said = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """``encoding | 12,000 documents | 48.1 MiB | 6.2 MiB/s | eta 41s``."""
        rate = self._bytes / max(now - self._began, 1e-9)
        text = f"{self._task} | {self._documents:,} documents | {units.size(self._bytes)} | {units.size(rate)}/s"
        left = (self._total or 0) - self._bytes
        return f"{text} | eta {units.duration(left / rate)}" if left > 0 and rate > 0 else text
