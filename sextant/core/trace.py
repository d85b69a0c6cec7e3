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
class Routes:
    """Where one MoE layer sent T tokens.

    Attributes:
        experts_TA: int64, best first.
        experts: how many the layer has.
        kept_TA: bool, copies that reached their expert; None when all did.
        sent_TA: bool, copies that the router wanted to send; None when it wanted all.
    """

    experts_TA: Tensor
    experts: int
    kept_TA: Tensor | None = None
    sent_TA: Tensor | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        both = {"kept": self.kept_TA, "sent": self.sent_TA}
        return {name: mask_TA for name, mask_TA in both.items() if mask_TA is not None}

    def mask(self, name: str) -> Tensor:
        """``kept`` or ``sent``, all true where there is none."""
        return self.masks.get(name, torch.ones_like(self.experts_TA, dtype=torch.bool))

    def at(self, index: slice | Tensor) -> Routes:
        """Of some tokens."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> Routes:
        """On another device."""
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Routes:
        masks = {f"{name}_TA": change(mask_TA) for name, mask_TA in self.masks.items()}
        return Routes(change(self.experts_TA), self.experts, **masks)


@dataclass(frozen=True)
class Reads:
    """What one attention layer read.

    Attributes:
        blocks_THJ: int64 block numbers counted from the start of each token's sequence, -1 for none; the second axis is
            that of the layer's choice.
        block: tokens of a block.
    """

    blocks_THJ: Tensor
    block: int

    def at(self, index: slice | Tensor) -> Reads:
        """Of some tokens."""
        return Reads(self.blocks_THJ[index], self.block)

    def to(self, device: torch.device | str) -> Reads:
        """On another device."""
        return Reads(self.blocks_THJ.to(device), self.block)

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
    @property
    def sent_TA(self) -> Tensor | None: ...


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
        routes: by layer index, where layers route.
        reads: by layer index, where layers select.
    """

    tokens: int
    routes: dict[int, Routes] = field(default_factory=dict)
    reads: dict[int, Reads] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Chosen) -> Trace:
        """The record of a forward. A choice that nothing was read by, as of a gate that only learns, is left out."""
        routes = {i: _routes(routing) for i, routing in output.routings.items()}
        reads = {i: Reads(s.blocks_THJ, s.block) for i, s in output.selections.items() if s.applied}
        return cls(len(output.hidden_TD), routes, reads)

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
        routes = {i: _cat_routes([part.routes[i] for part in parts]) for i in parts[0].routes}
        reads = {i: _cat_reads([part.reads[i] for part in parts]) for i in parts[0].reads}
        return cls(sum(part.tokens for part in parts), routes, reads)

    @property
    def shape(self) -> str:
        """Layers with their sizes, such as ``1: 2 of 64 experts, 2: 4 choosers of blocks of 16``."""
        routes = {i: f"{s.experts_TA.shape[1]} of {s.experts} experts" for i, s in self.routes.items()}
        reads = {i: f"{r.blocks_THJ.shape[1]} choosers of blocks of {r.block}" for i, r in self.reads.items()}
        both = sorted([*routes.items(), *reads.items()])
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
        routes = all(_same_routes(one, other.routes[i]) for i, one in self.routes.items())
        return routes and all(_same_reads(one, other.reads[i]) for i, one in self.reads.items())

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
            tokens = int(told["tokens"])
            routes = {int(i): _load_routes(tensors, i, int(count), tokens) for i, count in told["experts"].items()}
            reads = {int(i): _load_reads(tensors, i, int(block), tokens) for i, block in told["blocks"].items()}
            return cls(tokens, routes, reads)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("damaged record of choices", where=path, got=str(error)[:80]) from None

    def _each(self, tokens: int, change: Callable[[Any], Any]) -> Trace:
        routes, reads = ({i: change(part) for i, part in parts.items()} for parts in (self.routes, self.reads))
        return Trace(tokens, routes, reads)

    def _tensors(self) -> dict[str, Tensor]:
        about = {
            "tokens": self.tokens,
            "experts": {str(i): one.experts for i, one in sorted(self.routes.items())},
            "blocks": {str(i): one.block for i, one in sorted(self.reads.items())},
        }
        tensors = {_ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
        for i, one in self.routes.items():
            tensors[f"layers.{i}.experts"] = narrow(one.experts_TA)
            tensors |= {f"layers.{i}.{name}": mask_TA.clone() for name, mask_TA in one.masks.items()}
        return tensors | {f"layers.{i}.blocks": narrow(one.blocks_THJ) for i, one in self.reads.items()}


def narrow(x: Tensor) -> Tensor:
    """Integers in the smallest type that holds them all."""
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    return x.to(next(t for t in _NARROW if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max))


def _routes(routing: _Routing) -> Routes:
    return Routes(routing.experts_TA, routing.probs_TE.shape[1], routing.kept_TA, routing.sent_TA)


def _cat_routes(parts: Sequence[Routes]) -> Routes:
    names = {name for part in parts for name in part.masks}
    masks = {f"{name}_TA": torch.cat([part.mask(name) for part in parts]) for name in names}
    return Routes(torch.cat([part.experts_TA for part in parts]), parts[0].experts, **masks)


def _cat_reads(parts: Sequence[Reads]) -> Reads:
    return Reads(torch.cat(_even([part.blocks_THJ for part in parts])), parts[0].block)


def _even(blocks: Sequence[Tensor]) -> list[Tensor]:
    """As many places for all, the empty ones last."""
    places = max(part.shape[2] for part in blocks)
    return [F.pad(part, (0, places - part.shape[2]), value=-1) for part in blocks]


def _same_routes(one: Routes, two: Routes) -> bool:
    masks = all(torch.equal(one.mask(name), two.mask(name)) for name in ("kept", "sent"))
    return masks and torch.equal(one.experts_TA, two.experts_TA)


def _same_reads(one: Reads, two: Reads) -> bool:
    places = max(one.blocks_THJ.shape[2], two.blocks_THJ.shape[2])
    a, b = (F.pad(r.sets_THJ(), (places - r.blocks_THJ.shape[2], 0), value=-1) for r in (one, two))
    return torch.equal(a, b)


def _load_routes(tensors: Mapping[str, Tensor], layer: str, experts: int, tokens: int) -> Routes:
    experts_TA = tensors[f"layers.{layer}.experts"].long()
    _check(experts_TA.ndim == 2 and len(experts_TA) == tokens, f"layer {layer}: experts of {list(experts_TA.shape)}")
    inside = not experts_TA.numel() or (int(experts_TA.min()) >= 0 and int(experts_TA.max()) < experts)
    _check(inside, f"layer {layer}: an expert outside 0 to {experts - 1}")
    masks = {}
    for name in ("kept", "sent"):
        mask_TA = tensors.get(f"layers.{layer}.{name}")
        fits = mask_TA is None or (mask_TA.dtype == torch.bool and mask_TA.shape == experts_TA.shape)
        _check(fits, f"layer {layer}: {name} does not fit its experts")
        masks[f"{name}_TA"] = mask_TA
    return Routes(experts_TA, experts, **masks)


def _load_reads(tensors: Mapping[str, Tensor], layer: str, block: int, tokens: int) -> Reads:
    blocks_THJ = tensors[f"layers.{layer}.blocks"].long()
    _check(blocks_THJ.ndim == 3 and len(blocks_THJ) == tokens, f"layer {layer}: blocks of {list(blocks_THJ.shape)}")
    _check(not blocks_THJ.numel() or int(blocks_THJ.min()) >= -1, f"layer {layer}: a block below -1")
    return Reads(blocks_THJ, block)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
