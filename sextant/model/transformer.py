"""The one forward of the project: embed, blocks, norm, head. Training, prefill, chunks and decode all use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sextant.axes.attention.base import Selection
from sextant.axes.kv.position import Rotary
from sextant.axes.numerics import Numerics
from sextant.axes.routing import Routing
from sextant.axes.stability import Embedding, Linear, Role, initialise
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.model.block import Block
from sextant.model.spec import ModelSpec


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    Attributes:
        hidden_TD: final rows after the last norm, in the compute dtype; :meth:`Transformer.logits` goes on from there.
        routings: the decisions of each MoE layer, by layer index.
        selections: what each selecting attention layer chose to read, by layer index.
    """

    hidden_TD: Tensor
    routings: dict[int, Routing]
    selections: dict[int, Selection]


class Transformer(nn.Module):
    """A decoder-only model over a ragged stream. Build it with :meth:`ModelSpec.build`."""

    def __init__(self, spec: ModelSpec, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.recompute = False
        self.embedding = Embedding(spec.vocab, spec.width)
        self.blocks = nn.ModuleList(Block(layer, spec.width, numerics, i) for i, layer in enumerate(spec.layers))
        self.norm = spec.final_norm.build(spec.width)
        self.head = None if spec.tied else Linear(spec.width, spec.vocab, Role.HEAD)
        self.rotaries = {module.code: module for module in self.modules() if isinstance(module, Rotary)}

    @property
    def head_PD(self) -> Tensor:
        """The output matrix: the head's, or the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens_T: Tensor, stream: Stream) -> Output:
        """Run T tokens of the stream; with ``stream.memory`` they follow what it holds, and it grows by them."""
        dtype = self.numerics.compute or self.embedding.weight.dtype
        for code, rotary in self.rotaries.items():
            stream.turns[code] = rotary.turns(stream.positions_T, dtype)
        x_TD = self.embedding(tokens_T) * self.spec.embedding_scale
        routings, selections = {}, {}
        for index, block in enumerate(self.blocks):
            x_TD, selection, routing = self._run(block, x_TD, stream)
            if routing is not None:
                routings[index] = routing
            if selection is not None:
                selections[index] = selection
        if stream.memory is not None:
            stream.memory.commit(stream)
        return Output(self.numerics.lower(self.norm(x_TD)), routings, selections)

    def _run(
        self, block: nn.Module, x_TD: Tensor, stream: Stream
    ) -> tuple[Tensor, Selection | None, Routing | None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_TD, stream, use_reentrant=False)  # type: ignore[return-value]
        return block(x_TD, stream)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """fp32 ``[T, P]`` of the rows asked for."""
        head_PD = self.head_PD.to(hidden_TD.dtype)
        logits_TP = F.linear(hidden_TD, head_PD).to(torch.promote_types(hidden_TD.dtype, torch.float32))
        cap = self.spec.softcap
        return logits_TP if cap is None else cap * torch.tanh(logits_TP / cap)

    def memory(self, batch: int, undo: int = 0) -> Memory:
        """Empty decoding states for ``batch`` sequences, of which the last ``undo`` tokens can be taken back."""
        dtype = self.numerics.compute or self.embedding.weight.dtype
        return Memory(self.spec.states(), batch, dtype, self.embedding.weight.device, undo)

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
    initialise(model, spec.init, len(spec.layers), torch.Generator().manual_seed(seed))
    return model.to(device)
