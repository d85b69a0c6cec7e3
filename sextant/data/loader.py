"""Batches of packed rows in a random order that any number of processes shares, and held-out windows.

Rows are numbered over all epochs: the global samples. The cursor of a loader is such a number, so it resumes at once
and exactly, whatever the batch sizes and the number of processes were before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sextant.core.errors import CheckpointError, DataError, UsageError
from sextant.core.stream import Stream
from sextant.data.dataset import Shards
from sextant.data.order import shuffled
from sextant.data.packing import PACKINGS, Packing, Piece
from sextant.data.spec import Data
from sextant.kernels.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """Rows end to end as one stream.

    Attributes:
        tokens_T: int64 inputs.
        targets_T: int64, the token after each input; ``IGNORE`` where nothing is to be predicted.
        stream: boundaries of documents when they are masked, else of rows.
        samples: global number of each row, for messages and replay.
    """

    tokens_T: Tensor
    targets_T: Tensor
    stream: Stream
    samples: tuple[int, ...]

    @cached_property
    def predicted(self) -> int:
        """Targets that count."""
        return int((self.targets_T != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        stream = replace(
            self.stream, positions_T=self.stream.positions_T.to(device), cu_seqlens=self.stream.cu_seqlens.to(device)
        )
        return replace(self, tokens_T=self.tokens_T.to(device), targets_T=self.targets_T.to(device), stream=stream)


class Loader:
    """Training rows; ``take`` moves on."""

    def __init__(self, shards: Shards, data: Data, *, rank: int = 0, world: int = 1):
        """Row ``n`` is the same for every ``world``; process ``rank`` gets its contiguous share of each batch.

        Raises:
            DataError: fewer tokens than one row.
        """
        if not 0 <= rank < world:
            raise UsageError("no such process", where="rank", got=rank, expected=f"0 to {world - 1}")
        if shards.tokens < data.seq_len + 1:
            raise DataError(
                "fewer tokens than one row", where=f"{shards.folder} split '{shards.split}'", got=f"{shards.tokens:,}",
                expected=f"at least data.seq_len + 1 = {data.seq_len + 1:,}", fix="Lower data.seq_len or add text",
            )
        self.shards, self.data, self.rank, self.world = shards, data, rank, world
        self.cursor = 0
        self._epoch = -1
        self._enter(0)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the split; the same for every epoch."""
        return self._packing.rows

    @property
    def epoch(self) -> int:
        """The epoch that the next sample belongs to."""
        return self.cursor // self.rows_per_epoch

    def take(self, rows: int) -> Batch:
        """This process's share of the next ``rows`` samples.

        Raises:
            UsageError: ``rows`` is no positive multiple of the number of processes.
            DataError: the epochs are used up, or a token id is outside the vocabulary.
        """
        first = self._advance(rows)
        share = rows // self.world
        samples = range(first + self.rank * share, first + (self.rank + 1) * share)
        return _batch([self.row(sample) for sample in samples], self.data, tuple(samples))

    def skip(self, rows: int) -> None:
        """Pass over the next ``rows`` samples without reading them; errors as :meth:`take`."""
        self._advance(rows)

    def require(self, rows: int) -> None:
        """Make sure, before they are read, that so many more samples are there.

        Raises:
            DataError: the epochs are used up before.
        """
        limit = None if self.data.epochs is None else self.data.epochs * self.rows_per_epoch
        if limit is not None and self.cursor + rows > limit:
            raise DataError(
                "the epochs hold too few samples", where=f"data.epochs {self.data.epochs}",
                got=f"{limit - self.cursor:,} left of {limit:,}", expected=f"{rows:,}",
                fix="Raise data.epochs, lower steps, or add text",
            )

    def row(self, sample: int) -> Row:
        """Tokens, targets and boundaries of one global sample."""
        epoch, number = divmod(sample, self.rows_per_epoch)
        self._enter(epoch)
        return fill(self._packing.pieces(int(self._rows[number])), self.shards, self.data)

    def state_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the cursor, and what it is a cursor of."""
        return {"schema_version": 1, "samples": self.cursor, "order": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another loader was.

        Raises:
            CheckpointError: the state belongs to other data, or to another order of it.
        """
        expected, got = self._identity(), state["order"]
        for name, value in expected.items():
            if got.get(name) != value:
                raise CheckpointError(
                    "the loader's state is of other data", where=f"data {name}", got=_short(got.get(name)),
                    expected=_short(value), fix="Give the data of the checkpoint, or start a new run",
                )
        self.cursor = int(state["samples"])

    def _identity(self) -> dict[str, Any]:
        data = self.data
        return {
            "tokens": self.shards.fingerprint, "seq_len": data.seq_len, "packing": data.packing, "seed": data.seed,
        }

    def _advance(self, rows: int) -> int:
        if rows < 1 or rows % self.world:
            raise UsageError("rows must divide among processes", got=rows, expected=f"a multiple of {self.world}")
        self.require(rows)
        self.cursor += rows
        return self.cursor - rows

    def _enter(self, epoch: int) -> None:
        """Lay out an epoch: an order of documents, rows of them, and an order of rows."""
        if epoch == self._epoch:
            return
        lengths_N, seed = self.shards.lengths_N, self.data.seed
        order_N = shuffled(len(lengths_N), "documents", seed, epoch)
        self._packing: Packing = PACKINGS[self.data.packing](lengths_N, order_N, self.data.seq_len)
        self._rows = shuffled(self._packing.rows, "rows", seed, epoch)
        self._epoch = epoch


@dataclass(frozen=True)
class Row:
    """One row: arrays of ``seq_len``; ``starts_T`` is true where the row, a piece or the padding begins.

    ``used`` inputs come from documents, the others are padding.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    starts_T: np.ndarray
    used: int


def fill(pieces: list[Piece], shards: Shards, data: Data) -> Row:
    """Read the pieces of a row; what is left of it is padding, a sequence of its own that nothing is predicted in."""
    tokens = np.full(data.seq_len + 1, shards.tokenizer.eot_id, np.int64)
    starts = np.zeros(data.seq_len + 1, bool)
    at = 0
    for document, start, stop in pieces:
        tokens[at : at + stop - start] = shards.read(document, start, stop)
        starts[at] = True
        at += stop - start
    starts[at : at + 1] = True
    targets = tokens[1:].copy()
    targets[at - 1 :] = IGNORE
    if data.mask_documents:
        targets[starts[1:]] = IGNORE
    return Row(tokens[:-1], targets, starts[:-1], min(at, data.seq_len))


def _batch(rows: list[Row], data: Data, samples: tuple[int, ...]) -> Batch:
    starts_T = np.concatenate([row.starts_T for row in rows])
    if not data.mask_documents:
        starts_T = np.arange(len(starts_T)) % data.seq_len == 0
    tokens_T, targets_T = (np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens_T", "targets_T"))
    stream = Stream.packed(torch.from_numpy(starts_T), data.seq_len)
    return Batch(torch.from_numpy(tokens_T), torch.from_numpy(targets_T), stream, samples)


def heldout(shards: Shards, seq_len: int, rows: int) -> Iterator[Batch]:
    """The whole split once and in order, ``rows`` windows at a time.

    Each document is cut from its start into windows of ``seq_len`` inputs, the last one shorter; every token but the
    first of each document is a target exactly once. Windows start cold.
    """
    group: list[tuple[int, np.ndarray]] = []
    for number, window in enumerate(_windows(shards, seq_len)):
        group.append((number, window))
        if len(group) == rows:
            yield _window_batch(group, seq_len)
            group = []
    if group:
        yield _window_batch(group, seq_len)


def _windows(shards: Shards, seq_len: int) -> Iterator[np.ndarray]:
    for document, length in enumerate(shards.lengths_N.tolist()):
        for start in range(0, length - 1, seq_len):
            yield shards.read(document, start, min(start + seq_len + 1, length))


def _window_batch(group: list[tuple[int, np.ndarray]], seq_len: int) -> Batch:
    tokens_T = np.concatenate([window[:-1] for _, window in group])
    targets_T = np.concatenate([window[1:] for _, window in group])
    starts_T = np.zeros(len(tokens_T), bool)
    starts_T[np.cumsum([0, *(len(window) - 1 for _, window in group[:-1])])] = True
    stream = Stream.packed(torch.from_numpy(starts_T), seq_len)
    return Batch(torch.from_numpy(tokens_T), torch.from_numpy(targets_T), stream, tuple(n for n, _ in group))


def bytes_of(targets_T: Tensor, token_bytes_P: np.ndarray | Tensor) -> int:
    """UTF-8 bytes that the targets stand for: the denominator of bits per byte."""
    bytes_P = torch.as_tensor(token_bytes_P, device=targets_T.device)
    return int(bytes_P[targets_T[targets_T != IGNORE]].sum())


def _short(value: object) -> str:
    return str(value)[:12]
