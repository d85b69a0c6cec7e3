"""The one forward of the project: embed, blocks, norm, head. Training, prefill, chunks and decode all use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sextant.axes.attention.base import Selection
from sextant.axes.kv.position import Rotary
from sextant.axes.numerics import Numerics
from sextant.axes.routing import Routing
from sextant.axes.stability import Embedding, InitTable, Linear, Role, initialise, table
from sextant.core.errors import UsageError
from sextant.core.state import Memory, StateSpec
from sextant.core.stream import Stream
from sextant.core.trace import Trace
from sextant.kernels import matmul
from sextant.model.block import Block
from sextant.model.mtp import MTPModule, without_last
from sextant.model.replay import check_replay
from sextant.model.spec import ModelSpec


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    Attributes:
        hidden_TD: final rows after the last norm, in the compute dtype; :meth:`Transformer.logits` goes on from there.
        routings: the decisions of each MoE layer, by layer index.
        selections: what each selecting attention layer chose to read, by layer index.
        onward_TD: rows that a prediction module goes on from; None in a model without any.
        ahead: what each prediction module gave, when asked for.
    """

    hidden_TD: Tensor
    routings: dict[int, Routing]
    selections: dict[int, Selection]
    onward_TD: Tensor | None = None
    ahead: tuple[Ahead, ...] = ()

    @property
    def all_routings(self) -> dict[int, Routing]:
        """With those of the prediction modules, which have fewer rows."""
        return self.routings | {i: routing for one in self.ahead for i, routing in one.out.routings.items()}

    @property
    def all_selections(self) -> dict[int, Selection]:
        """With those of the prediction modules."""
        return self.selections | {i: one for ahead in self.ahead for i, one in ahead.out.selections.items()}

    def trace(self) -> Trace:
        """The choices of this forward, to be kept or replayed; those of prediction modules are theirs."""
        return Trace.of(self)


@dataclass(frozen=True)
class Ahead:
    """What one prediction module gave for those tokens of a stream that have a further one in their sequence.

    Attributes:
        out: its rows and decisions, the latter under the layer index ``L + k - 1`` of module ``k``.
        stream: the tokens it ran on: all but the last ``k`` of each sequence.
        read_T: int64, number in the whole stream of the token that each row saw last. What is to be predicted after
            that token is the row's target.
    """

    out: Output
    stream: Stream
    read_T: Tensor


class Transformer(nn.Module):
    """A decoder-only model over a ragged stream. Build it with :meth:`ModelSpec.build`."""

    def __init__(self, spec: ModelSpec, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.recompute, self.head_scale = False, spec.init.head_scale(spec.width)
        self.embedding = Embedding(spec.vocab, spec.width)
        self.blocks = nn.ModuleList(Block(layer, spec.width, numerics, i) for i, layer in enumerate(spec.layers))
        self.norm = spec.final_norm.build(spec.width)
        self.head = None if spec.tied else Linear(spec.width, spec.vocab, Role.HEAD)
        self.mtp = nn.ModuleList(
            MTPModule(spec.mtp, layer, spec.final_norm, spec.width, numerics)
            for layer in spec.mtp_layers if spec.mtp is not None
        )
        self.rotaries = {module.code: module for module in self.modules() if isinstance(module, Rotary)}
        numerics.attach(self)

    @property
    def head_PD(self) -> Tensor:
        """The output matrix: the head's, or the embedding's when tied; scaled where the start says so (muP)."""
        head_PD, scale = (self.embedding if self.head is None else self.head).weight, self.head_scale
        return head_PD if scale == 1 else head_PD * scale

    @property
    def init_table(self) -> InitTable:
        """How each parameter starts, and at which rates it learns."""
        return table(self, self.spec.init, self.spec.width, len(self.spec.layers))

    @property
    def all_blocks(self) -> list[Block]:
        """Those of the model, then those of its prediction modules, as :attr:`ModelSpec.all_layers` declares them."""
        return [*self.blocks, *(module.block for module in self.mtp)]  # type: ignore[list-item]

    def forward(self, tokens_T: Tensor, stream: Stream, ahead: bool = False) -> Output:
        """Run T tokens of the stream; with ``stream.memory`` they follow what it holds, and it grows by them.

        Args:
            ahead: run the prediction modules too, each on the true tokens, as training does; a replay is not for them.

        Raises:
            UsageError: ``ahead`` with a memory; ``stream.replay`` is of other tokens or of another model.
        """
        if stream.replay is not None:
            check_replay(self.spec, stream.replay, len(tokens_T))
        self._turn(stream)
        x_TD = self._embedded(tokens_T)
        routings, selections = {}, {}
        for index, block in enumerate(self.blocks):
            x_TD = self._run(block, x_TD, stream, index, routings, selections)
        if stream.memory is not None:
            stream.memory.commit(stream)
        out = self._output(self.norm, x_TD, routings, selections)
        return replace(out, ahead=tuple(self._ahead(out, tokens_T, stream))) if ahead else out

    def draft(self, rows_TD: Tensor, next_T: Tensor, stream: Stream, module: int = 0) -> Output:
        """One prediction module: what comes after tokens that the model has not read.

        Args:
            rows_TD: ``onward_TD`` rows of the model, or of the module before this one.
            next_T: the token that each row has to see next: of module ``k`` (from 0) on the row of token ``i`` it is
                token ``i + k + 1``, and the logits are for the one after it.
            stream: positions of the rows; its memory, if any, is of :meth:`draft_memory` for the same module.
            module: its number.
        """
        own: MTPModule = self.mtp[module]  # type: ignore[assignment]
        self._turn(stream)
        x_TD = own.enter(rows_TD, self._embedded(next_T))
        routings, selections = {}, {}
        x_TD = self._run(own.block, x_TD, stream, len(self.blocks) + module, routings, selections)
        if stream.memory is not None:
            stream.memory.commit(stream)
        return self._output(own.norm, x_TD, routings, selections)

    def _ahead(self, out: Output, tokens_T: Tensor, stream: Stream) -> Iterator[Ahead]:
        """The modules in a row; none once no sequence is long enough."""
        if stream.memory is not None:
            raise UsageError("prediction modules run ahead in training only", got="a memory", fix="Use draft")
        read_T = torch.arange(tokens_T.numel(), device=tokens_T.device)
        for module in range(len(self.mtp)):
            stream, rows_T = without_last(stream)
            if not rows_T.numel() or out.onward_TD is None:
                return
            read_T = read_T[rows_T] + 1
            out = self.draft(out.onward_TD[rows_T], tokens_T[read_T], stream, module)
            yield Ahead(out, stream, read_T)

    def _turn(self, stream: Stream) -> None:
        """Cosines and sines of the stream's positions, for all layers."""
        dtype = self.numerics.compute or self.embedding.weight.dtype
        for code, rotary in self.rotaries.items():
            stream.turns[code] = rotary.turns(stream.positions_T, dtype)

    def _embedded(self, tokens_T: Tensor) -> Tensor:
        return self.embedding(tokens_T) * self.spec.embedding_scale

    def _run(
        self, block: nn.Module, x_TD: Tensor, stream: Stream, index: int, routings: dict[int, Routing],
        selections: dict[int, Selection],
    ) -> Tensor:
        """One block's rows; what it decided goes under its index."""
        if self.recompute and torch.is_grad_enabled():
            x_TD, selection, routing = checkpoint(block, x_TD, stream, use_reentrant=False)  # type: ignore[misc]
        else:
            x_TD, selection, routing = block(x_TD, stream)
        if routing is not None:
            routings[index] = routing
        if selection is not None:
            selections[index] = selection
        return x_TD

    def _output(
        self, norm: nn.Module, x_TD: Tensor, routings: dict[int, Routing], selections: dict[int, Selection]
    ) -> Output:
        hidden_TD = self.numerics.lower(norm(x_TD))
        mtp = self.spec.mtp
        onward_TD = None if mtp is None else hidden_TD if mtp.hidden == "post_norm" else x_TD
        return Output(hidden_TD, routings, selections, onward_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """fp32 ``[T, P]`` of the rows asked for."""
        head_PD = self.head_PD.to(hidden_TD.dtype)
        logits_TP = matmul.linear(hidden_TD, head_PD).to(torch.promote_types(hidden_TD.dtype, torch.float32))
        cap = self.spec.softcap
        return logits_TP if cap is None else cap * torch.tanh(logits_TP / cap)

    def memory(self, batch: int, undo: int = 0) -> Memory:
        """Empty decoding states for ``batch`` sequences, of which the last ``undo`` tokens can be taken back."""
        return self._memory(self.spec.states(), batch, undo)

    def draft_memory(self, batch: int, undo: int = 0, module: int = 0) -> Memory:
        """Empty states of one prediction module, which :meth:`draft` fills with the rows that it is given."""
        return self._memory([self.spec.mtp_layers[module].state()], batch, undo)

    def _memory(self, states: list[StateSpec], batch: int, undo: int) -> Memory:
        dtype = self.numerics.compute or self.embedding.weight.dtype
        return Memory(states, batch, dtype, self.embedding.weight.device, undo)

    def batch_logits(self, tokens_BT: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits ``[B, T, P]`` of a padded batch in the ecosystem's layout; rows past a length are left at 0."""
        batch, longest = tokens_BT.shape
        lengths = [longest] * batch if lengths is None else list(lengths)
        device = tokens_BT.device
        real_BT = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        stream = Stream.of_lengths(lengths, tokens_BT.device)
        logits_TP = self.logits(self(tokens_BT[real_BT], stream).hidden_TD)
        padded_BTP = logits_TP.new_zeros(batch, longest, self.spec.vocab)
        padded_BTP[real_BT] = logits_TP
        return padded_BTP


def build(spec: ModelSpec, numerics: Numerics, device: torch.device | str, seed: int) -> Transformer:
    """A model with parameters drawn from ``seed`` on the CPU, so that every device starts alike."""
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return Transformer(spec, numerics)
    model = Transformer(spec, numerics)
    initialise(model, model.init_table, torch.Generator().manual_seed(seed))
    return model.to(device)
