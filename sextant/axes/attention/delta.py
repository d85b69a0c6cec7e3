"""What the mixers with a delta rule share: short convolution, unit queries and keys, forgetting, and the recurrence.

They differ in how they project and gate: :mod:`~sextant.axes.attention.gated_delta` (one decay per head) and
:mod:`~sextant.axes.attention.kda` (one per key channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sextant.axes.attention.recurrence import Rows, Scan, walk
from sextant.axes.stability import Role
from sextant.core.cost import At, Cost
from sextant.core.state import JointSpec, JointState, LayerState, RecurrentSpec, RecurrentState, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.linear.delta import delta_rule


@dataclass(frozen=True)
class DeltaShape:
    """Sizes of a delta rule behind a short convolution.

    Attributes:
        key_heads: G heads of queries and keys, each of which serves as many neighbouring heads of values.
        value_heads: H heads of values, and states.
        k_dim: K.
        v_dim: V.
        taps: of the convolution, the token's own included.
        chunk: tokens whose corrections are solved for at once; changes the speed alone.
    """

    key_heads: int
    value_heads: int
    k_dim: int
    v_dim: int
    taps: int
    chunk: int

    @property
    def parts(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        keys = self.key_heads * self.k_dim
        return keys, keys, self.value_heads * self.v_dim

    def state(self) -> JointSpec:
        """The recurrence's state, and what the convolution reads of the past."""
        memory = RecurrentSpec((self.value_heads, self.k_dim, self.v_dim))
        return JointSpec.of(memory=memory, past=RowSpec(1, sum(self.parts), 0, window=self.taps - 1))

    def cost(self, at: At) -> Cost:
        """Convolution ``2 taps (2 G K + H V)``; per token and head, the state's three products ``6 K V``; in a chunk
        ``2 (K + V)`` for each pair of a token with itself or one before it, and ``2 K + 2 (K + V)``, overlap and
        solution, for each with one before it.
        """
        channels, k_dim, v_dim = sum(self.parts), self.k_dim, self.v_dim
        whole, rest = divmod(at.tokens, self.chunk)
        pairs = (whole * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2 / at.tokens
        rule = 6.0 * k_dim * v_dim + 2.0 * (k_dim + v_dim) * pairs + 2.0 * (2 * k_dim + v_dim) * (pairs - 1)
        taps, state = self.taps * channels, self.state()
        held, read = state.nbytes(at.tokens, at.itemsize), state.read_bytes(at.tokens, at.itemsize)
        # rows into the convolution, out of it and through SiLU; q and k in fp32, before and after their norm
        kept = 3 * at.itemsize * channels + 2 * 4 * (channels - self.parts[2])
        return Cost(taps, taps, 2.0 * taps + self.value_heads * rule, held, read, kept)

    def build(self) -> DeltaCore:
        return DeltaCore(self)


class DeltaCore(nn.Module):
    """``silu(conv(q, k, v))``, then the recurrence with q and k of length 1, and q divided by the root of K."""

    def __init__(self, shape: DeltaShape):
        super().__init__()
        self.shape = shape
        self.conv = ShortConv(sum(shape.parts), shape.taps)

    def forward(
        self, qkv: Tensor, log_decay: Tensor, beta_TH: Tensor, stream: Stream, state: LayerState | None
    ) -> Tensor:
        """``o_THV`` in fp32.

        Args:
            qkv: ``[T, 2 G K + H V]``, heads of q, then of k, then of v.
            log_decay: ``[T, H, 1 or K]``, at most 0.
        """
        joint = state if isinstance(state, JointState) else None
        past = joint and joint.part("past", RowState)
        parts = F.silu(self.conv(qkv, stream, past)).split(self.shape.parts, dim=-1)
        q_TGK, k_TGK = (unit(part.unflatten(-1, (self.shape.key_heads, -1))) for part in parts[:2])
        v_THV = parts[2].unflatten(-1, (self.shape.value_heads, -1))
        rows = q_TGK * self.shape.k_dim**-0.5, k_TGK, v_THV, log_decay, beta_TH
        return walk(rows, stream, joint and joint.part("memory", RecurrentState), corrected(self.shape.chunk))


class ShortConv(nn.Module):
    """A depthwise causal convolution within each sequence: ``[T, C] -> [T, C]``, the last tap weighs the token itself.

    ``weight`` is ``[C, 1, taps]``. It starts with the own tap at 1 and the others drawn like a matrix: near the
    identity, which a convolution drawn as a whole is not.
    """

    roles = {"weight": Role.ATTENTION_IN}

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))

    def forward(self, x: Tensor, stream: Stream, past: RowState | None) -> Tensor:
        """``past`` takes this step's rows in, and gives those before them."""
        if past is not None:
            past.append(x[:, None], x[:, None], stream)
        if not len(x):
            return x
        rows = torch.cat(list(self._with_past(x, stream, past)))
        made = F.conv1d(rows.t()[None], self.weight.to(x.dtype), groups=x.shape[1])[0].t()
        skipped_T = (self.weight.shape[2] - 1) * stream.sequence_T  # outputs that straddle two sequences
        return made[torch.arange(len(x), device=x.device) + skipped_T]

    def _with_past(self, x: Tensor, stream: Stream, past: RowState | None) -> Iterator[Tensor]:
        """Rows of each sequence behind the ``taps - 1`` before them, zeros where its beginning leaves none."""
        for b, own in enumerate(x.split(stream.lengths)):
            need = len(own) + self.weight.shape[2] - 1
            rows = own if past is None else past.sequence(b)[0][-need:, 0]
            yield F.pad(rows, (0, 0, need - len(rows), 0))

    def fill(self, gain: float) -> None:
        """Set the weight of the token itself."""
        nn.init.constant_(self.weight[..., -1], gain)


class Forget(nn.Module):
    """Log decays ``-exp(A_log) softplus(logits + dt_bias)``, in fp32, with one ``A_log`` per head (Mamba-2's form).

    Both start spread evenly, as the papers draw them: rates A over 1 to 16, and softplus of the bias from 0.001 to 0.1
    by equal factors, so that some heads forget within tokens and others over thousands.
    """

    def __init__(self, heads: int, each: int):
        super().__init__()
        self.rate_log_H = nn.Parameter(torch.empty(heads))
        self.bias = nn.Parameter(torch.empty(heads * each))

    def forward(self, logits: Tensor) -> Tensor:
        """``[T, H * each]`` -> ``[T, H, each]``."""
        steps = F.softplus(wide(logits) + self.bias).unflatten(-1, (len(self.rate_log_H), -1))
        return -self.rate_log_H.exp()[:, None] * steps

    @torch.no_grad()
    def fill(self, gain: float) -> None:
        """Set the start, with all rates times ``gain``."""
        heads, channels = len(self.rate_log_H), len(self.bias)
        self.rate_log_H.copy_((gain * torch.linspace(1, 16, heads)).log())
        steps = torch.logspace(-3, -1, channels).view(-1, heads).t()  # every head gets the whole range
        self.bias.copy_(torch.expm1(steps).log().flatten())


def forget_cost(heads: int, each: int) -> Cost:
    """Parameters of :class:`Forget`; what it keeps is its logits in fp32, their sum with the bias, and two products."""
    count = heads + heads * each
    return Cost(count, count, activation_bytes=3 * 4 * heads * each)


def corrected(chunk: int) -> Scan:
    """The scan of rows q, k, v, log decays ``[B, T, H, 1 or K]`` and betas ``[B, T, H]``."""

    def scan(rows: Rows, before: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta = rows
        return delta_rule(q, k, v, log_decay, beta, before, chunk)

    return scan


def unit(x: Tensor) -> Tensor:
    """Last axis of length 1, in fp32; ``1e-6`` is added to the square, as all implementations do."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
