"""What a model chose, token by token: experts of every MoE layer, blocks of every layer that selects what it reads.

A record of one forward can be cut, joined and saved, and fed back: with ``stream.replay`` layers take their choices
from it and compute everything else anew, gates included. Rows belong to tokens and layers, not to calls, so recomputing
activations, other chunks and packing change nothing (MAI-Base-1, section 6.4; 2510.11370).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.core import fs, tensorfile
from sextant.core.errors import CheckpointError, UsageError

_ABOUT = "about"
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Sent:
    """Where one MoE layer sent T tokens.

    Attributes:
        experts_TA: int64, best first.
        experts: how many the layer has.
        kept_TA: bool, copies that reached their expert; None when all did.
    """

    experts_TA: Tensor
    experts: int
    kept_TA: Tensor | None = None

    def at(self, index: slice | Tensor) -> Sent:
        """Of some tokens."""
        return Sent(self.experts_TA[index], self.experts, None if self.kept_TA is None else self.kept_TA[index])

    def to(self, device: torch.device | str) -> Sent:
        """On another device."""
        return Sent(self.experts_TA.to(device), self.experts, None if self.kept_TA is None else self.kept_TA.to(device))


@dataclass(frozen=True)
class Read:
    """What one attention layer read.

    Attributes:
        blocks_THJ: int64 block numbers counted from the start of each token's sequence, -1 for none; the second axis is
            that of the layer's choice.
        block: tokens of a block.
    """

    blocks_THJ: Tensor
    block: int

    def at(self, index: slice | Tensor) -> Read:
        """Of some tokens."""
        return Read(self.blocks_THJ[index], self.block)

    def to(self, device: torch.device | str) -> Read:
        """On another device."""
        return Read(self.blocks_THJ.to(device), self.block)

    def sets_THJ(self) -> Tensor:
        """Blocks in rising order: their order and empty places mean nothing."""
        return self.blocks_THJ.sort(-1).values


class _Routing(Protocol):
    """What :class:`~sextant.axes.routing.Routing` tells."""

    @property
    def probs_TE(self) -> Tensor: ...
    @property
    def experts_TA(self) -> Tensor: ...
    @property
    def kept_TA(self) -> Tensor | None: ...


class _Selection(Protocol):
    """What :class:`~sextant.axes.attention.base.Selection` tells."""

    @property
    def blocks_THJ(self) -> Tensor: ...
    @property
    def block(self) -> int: ...
    @property
    def applied(self) -> bool: ...


class Chosen(Protocol):
    """What a forward gives, as :class:`~sextant.model.transformer.Output` holds it."""

    @property
    def hidden_TD(self) -> Tensor: ...
    @property
    def routings(self) -> Mapping[int, _Routing]: ...
    @property
    def selections(self) -> Mapping[int, _Selection]: ...


@dataclass(frozen=True)
class Trace:
    """The choices of T tokens.

    Attributes:
        tokens: T.
        sent: by layer index, where layers route.
        read: by layer index, where layers select.
    """

    tokens: int
    sent: dict[int, Sent] = field(default_factory=dict)
    read: dict[int, Read] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Chosen) -> Trace:
        """The record of a forward. A choice that nothing was read by, as of a gate that only learns, is left out."""
        sent = {i: Sent(r.experts_TA, r.probs_TE.shape[1], r.kept_TA) for i, r in output.routings.items()}
        read = {i: Read(s.blocks_THJ, s.block) for i, s in output.selections.items() if s.applied}
        return cls(len(output.hidden_TD), sent, read)

    @classmethod
    def cat(cls, parts: Sequence[Trace]) -> Trace:
        """Of chunks or steps, one after another.

        Raises:
            UsageError: no part, or parts that differ in their layers, experts or blocks.
        """
        if not parts:
            raise UsageError("no records to join")
        for part in parts[1:]:
            if part.shape != parts[0].shape:
                raise UsageError("records of different models", got=part.shape, expected=parts[0].shape)
        sent = {i: _cat_sent([part.sent[i] for part in parts]) for i in parts[0].sent}
        read = {i: _cat_read([part.read[i] for part in parts]) for i in parts[0].read}
        return cls(sum(part.tokens for part in parts), sent, read)

    @property
    def shape(self) -> str:
        """Layers with their sizes, such as ``1: 2 of 64 experts, 2: 4 choosers of blocks of 16``."""
        sent = {i: f"{s.experts_TA.shape[1]} of {s.experts} experts" for i, s in self.sent.items()}
        read = {i: f"{r.blocks_THJ.shape[1]} choosers of blocks of {r.block}" for i, r in self.read.items()}
        both = sorted([*sent.items(), *read.items()])
        return ", ".join(f"{i}: {what}" for i, what in both) or "no layer that chooses"

    def __getitem__(self, index: slice | Tensor) -> Trace:
        """Of some tokens: a slice, or int64 or bool numbers of rows."""
        count = len(torch.arange(self.tokens)[index.cpu() if isinstance(index, Tensor) else index])
        return self._each(count, lambda part: part.at(index))

    def split(self, lengths: Sequence[int]) -> list[Trace]:
        """One record per sequence.

        Raises:
            UsageError: lengths that do not add up to T.
        """
        if sum(lengths) != self.tokens:
            raise UsageError("lengths do not cover the record", got=sum(lengths), expected=self.tokens)
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        return [self[start:stop] for start, stop in pairwise(ends)]

    def to(self, device: torch.device | str) -> Trace:
        """On another device."""
        return self._each(self.tokens, lambda part: part.to(device))

    def same(self, other: Trace) -> bool:
        """Whether every token met the same experts in the same order and read the same blocks."""
        if (self.tokens, self.shape) != (other.tokens, other.shape):
            return False
        kept = all(_same_kept(one, other.sent[i]) for i, one in self.sent.items())
        sent = all(torch.equal(one.experts_TA, other.sent[i].experts_TA) for i, one in self.sent.items())
        return kept and sent and all(_same_read(one, other.read[i]) for i, one in self.read.items())

    def digest(self) -> str:
        """SHA-256 of what :meth:`save` writes."""
        digest = hashlib.sha256()
        for piece in tensorfile.chunks(self._tensors()):
            digest.update(piece)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """A safetensors file, every number in the smallest type that holds its tensor."""
        fs.write_bytes(path, b"".join(tensorfile.chunks(self._tensors())))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read back what :meth:`save` wrote.

        Raises:
            CheckpointError: not such a file, or numbers in it that name no expert or no block.
        """
        tensors = tensorfile.read(path)
        about = tensors.get(_ABOUT)
        if about is None or about.dtype != torch.uint8 or about.ndim != 1:
            raise CheckpointError("not a record of choices", where=path, fix="Trace.save writes them")
        told = tensorfile.strict_json(about.numpy().tobytes(), path)
        try:
            sent = {int(i): _load_sent(tensors, i, int(count), told["tokens"]) for i, count in told["experts"].items()}
            read = {int(i): _load_read(tensors, i, int(block), told["tokens"]) for i, block in told["blocks"].items()}
            return cls(int(told["tokens"]), sent, read)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("damaged record of choices", where=path, got=str(error)[:80]) from None

    def _each(self, tokens: int, change: Callable[[Any], Any]) -> Trace:
        sent, read = ({i: change(part) for i, part in parts.items()} for parts in (self.sent, self.read))
        return Trace(tokens, sent, read)

    def _tensors(self) -> dict[str, Tensor]:
        about = {
            "tokens": self.tokens,
            "experts": {str(i): one.experts for i, one in sorted(self.sent.items())},
            "blocks": {str(i): one.block for i, one in sorted(self.read.items())},
        }
        tensors = {_ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
        for i, one in self.sent.items():
            tensors[f"layers.{i}.experts"] = narrow(one.experts_TA)
            if one.kept_TA is not None:
                tensors[f"layers.{i}.kept"] = one.kept_TA
        return tensors | {f"layers.{i}.blocks": narrow(one.blocks_THJ) for i, one in self.read.items()}


def narrow(x: Tensor) -> Tensor:
    """Integers in the smallest type that holds them all."""
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    return x.to(next(t for t in _NARROW if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max))


def _cat_sent(parts: Sequence[Sent]) -> Sent:
    kept = None
    if any(part.kept_TA is not None for part in parts):
        whole = (torch.ones_like(part.experts_TA, dtype=torch.bool) for part in parts)
        kept = torch.cat([all_TA if p.kept_TA is None else p.kept_TA for p, all_TA in zip(parts, whole, strict=True)])
    return Sent(torch.cat([part.experts_TA for part in parts]), parts[0].experts, kept)


def _cat_read(parts: Sequence[Read]) -> Read:
    return Read(torch.cat(_even([part.blocks_THJ for part in parts])), parts[0].block)


def _even(blocks: Sequence[Tensor]) -> list[Tensor]:
    """As many places for all, the empty ones last."""
    places = max(part.shape[2] for part in blocks)
    return [F.pad(part, (0, places - part.shape[2]), value=-1) for part in blocks]


def _same_kept(one: Sent, two: Sent) -> bool:
    a, b = (torch.ones_like(s.experts_TA, dtype=torch.bool) if s.kept_TA is None else s.kept_TA for s in (one, two))
    return torch.equal(a, b)


def _same_read(one: Read, two: Read) -> bool:
    places = max(one.blocks_THJ.shape[2], two.blocks_THJ.shape[2])
    a, b = (F.pad(r.sets_THJ(), (places - r.blocks_THJ.shape[2], 0), value=-1) for r in (one, two))
    return torch.equal(a, b)


def _load_sent(tensors: Mapping[str, Tensor], layer: str, experts: int, tokens: int) -> Sent:
    chosen_TA, kept_TA = tensors[f"layers.{layer}.experts"].long(), tensors.get(f"layers.{layer}.kept")
    _check(chosen_TA.ndim == 2 and len(chosen_TA) == tokens, f"layer {layer}: experts of {list(chosen_TA.shape)}")
    fits = kept_TA is None or (kept_TA.dtype == torch.bool and kept_TA.shape == chosen_TA.shape)
    _check(fits, f"layer {layer}: a mask that does not fit its experts")
    inside = not chosen_TA.numel() or (int(chosen_TA.min()) >= 0 and int(chosen_TA.max()) < experts)
    _check(inside, f"layer {layer}: an expert outside 0 to {experts - 1}")
    return Sent(chosen_TA, experts, kept_TA)


def _load_read(tensors: Mapping[str, Tensor], layer: str, block: int, tokens: int) -> Read:
    blocks_THJ = tensors[f"layers.{layer}.blocks"].long()
    _check(blocks_THJ.ndim == 3 and len(blocks_THJ) == tokens, f"layer {layer}: blocks of {list(blocks_THJ.shape)}")
    _check(not blocks_THJ.numel() or int(blocks_THJ.min()) >= -1, f"layer {layer}: a block below -1")
    return Read(blocks_THJ, block)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
