"""Multi-head latent attention: all heads' keys and values are products of one latent row per token (2405.04434).

A token keeps its normalised latent (R numbers) and one rotated key that all heads share; a query and a key meet in both
parts. Two forms of the same weights give the same numbers (spec deepseek-v3 1.4):

* multiplied out: every key and value by head, ordinary attention. Training and prompts.
* absorbed: the key matrix moves to the query, the value matrix to the output, and attention is multi-query over the
  kept rows, whose values are the first R numbers of the keys themselves. Decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.kv.base import KV, Heads, Projections
from sextant.axes.kv.position import RoPE, YaRNScaling
from sextant.axes.numerics import Numerics
from sextant.axes.stability import AnyNorm, Linear, RMSNorm, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import Keys, RowSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores


class MLA(KV):
    """H heads over one latent row per token, with a rotary part beside it (spec deepseek-v3 1.2).

    Attributes:
        rank: R, width of the latent that keys and values are made of.
        nope_dim, rope_dim: widths of a head's key without and with position, in this order.
        v_dim: width of a head's value.
        q_rank: width of a latent for the queries, which saves training memory; None projects them at once (V2-Lite).
        norm: of both latents.
        position: turns the rotary part; YaRN with ``mscale_all_dim`` also scales the scores.
        bias: on what reads and writes the model's rows, except on queries that are projected at once.
    """

    kind: Literal["mla"] = "mla"
    heads: int = Field(ge=1)
    rank: int = Field(ge=1)
    nope_dim: int = Field(ge=1)
    rope_dim: int = Field(ge=2)
    v_dim: int = Field(ge=1)
    q_rank: int | None = Field(default=None, ge=1)
    norm: AnyNorm = RMSNorm()
    position: RoPE = RoPE(layout="interleaved")
    bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> MLA:
        self.position.rotary_dim(self.rope_dim)
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.heads, self.heads, self.nope_dim + self.rope_dim, self.v_dim

    @property
    def scale(self) -> float:
        """What scores are multiplied by: ``m^2 / sqrt(nope_dim + rope_dim)``, with YaRN's m (spec 9)."""
        scaling = self.position.scaling
        temperature = scaling.score_scale if isinstance(scaling, YaRNScaling) else 1.0
        return temperature * (self.nope_dim + self.rope_dim) ** -0.5

    def row(self, window: int | None = None, sinks: int = 0) -> RowSpec:
        """One row for all heads: the normalised latent and the rotated key."""
        return RowSpec(1, self.rank + self.rope_dim, 0, window, sinks, shared=self.rank)

    def query_width(self, width: int) -> int:
        return self.q_rank or width

    def build(self, width: int, numerics: Numerics) -> MLAModule:
        return MLAModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        """As training runs it: latents multiplied out once per token."""
        heads, _, k_dim, v_dim = self.shape
        cost = Cost.of_matrix(width, self.rank + self.rope_dim, at) + self.norm.cost(self.rank, at)
        cost += Cost.of_matrix(self.rank, heads * (self.nope_dim + v_dim), at)
        cost += Cost.of_matrix(heads * v_dim, width, at, keep_input=False)
        cost += Cost.of_matrix(self.query_width(width), heads * k_dim, at, keep_input=self.q_rank is not None)
        if self.q_rank is not None:
            cost += Cost.of_matrix(width, self.q_rank, at, keep_input=False) + self.norm.cost(self.q_rank, at)
        biases = (self.q_rank or 0) + self.rank + self.rope_dim + width if self.bias else 0
        return cost + Cost(biases, biases)

    def multiplied_flops(self, pairs: int, keys: int) -> float:
        """FLOPs of attention over ``pairs`` of a query and a key, with ``keys`` latents multiplied out first."""
        heads, _, k_dim, v_dim = self.shape
        return 2.0 * heads * (pairs * (k_dim + v_dim) + keys * self.rank * (self.nope_dim + v_dim))

    def absorbed_flops(self, pairs: int, queries: int) -> float:
        """FLOPs of attention over the kept rows, with what ``queries`` pay to absorb."""
        per_pair, per_query = 2 * self.rank + self.rope_dim, self.rank * (self.nope_dim + self.v_dim)
        return 2.0 * self.heads * (pairs * per_pair + queries * per_query)

    def multiplies(self, queries: Sequence[int], held: Sequence[int]) -> bool:
        """Whether a step of ``queries[b]`` new tokens after ``held[b]`` kept ones costs less with all multiplied out.

        Per sequence the crossover is near ``R (nope + v) / (2 R - nope - v)`` queries, 171 in DeepSeek-V3 (spec 1.6).
        """
        keys = [new + old for new, old in zip(queries, held, strict=True)]
        pairs = sum(new * all_ for new, all_ in zip(queries, keys, strict=True))
        return self.multiplied_flops(pairs, sum(keys)) < self.absorbed_flops(pairs, sum(queries))


class LatentQueries(nn.Module):
    """Queries of all heads by way of a normalised latent, ``[T, R]`` and ``[T, H K]``."""

    def __init__(self, spec: MLA, rank: int, width: int, numerics: Numerics):
        super().__init__()
        self.numerics = numerics
        self.down = Linear(width, rank, Role.ATTENTION_IN, spec.bias)
        self.norm = spec.norm.build(rank)
        self.up = Linear(rank, spec.heads * spec.shape[2], Role.ATTENTION_IN)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        latent_TR = self.numerics.lower(self.norm(self.down(x_TD)))
        return latent_TR, self.up(latent_TR)


class MLAModule(Projections):
    """Projections of one layer; ``kv_a`` and ``kv_b`` as in spec deepseek-v3 1.3."""

    def __init__(self, spec: MLA, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        heads, _, k_dim, v_dim = spec.shape
        if spec.q_rank is None:
            self.q: Linear | LatentQueries = Linear(width, heads * k_dim, Role.ATTENTION_IN)
        else:
            self.q = LatentQueries(spec, spec.q_rank, width, numerics)
        self.kv_a = Linear(width, spec.rank + spec.rope_dim, Role.ATTENTION_IN, spec.bias)
        self.kv_norm = spec.norm.build(spec.rank)
        each = spec.nope_dim + v_dim
        self.kv_b = Linear(spec.rank, heads * each, Role.ATTENTION_IN, values=Values(each, spec.nope_dim, each))
        self.o = Linear(heads * v_dim, width, Role.ATTENTION_OUT, spec.bias)
        self.position = spec.position.build(heads, spec.rope_dim)

    @property
    def scores(self) -> Scores:
        """The scale; both forms share it."""
        return Scores(self.spec.scale)

    def project(self, x_TD: Tensor, stream: Stream, reads_state: bool = False) -> Heads:
        """Heads of the form that suits the step: by head without a state, on an empty one that the pattern need not
        read, and for chunks long enough to pay for multiplying their prefix out; absorbed otherwise.
        """
        x_TD = self.numerics.lower(x_TD)
        latent_TR, q = self.q(x_TD) if isinstance(self.q, LatentQueries) else (None, self.q(x_TD))
        q_THK, row_TGK = self._rotated(q, self.kv_a(x_TD), stream)
        kept = row_TGK, row_TGK[..., : self.spec.rank]
        if self._absorbs(stream, reads_state):
            return Heads(self._absorbed(q_THK), *kept, latent=True, q_latent_TR=latent_TR)
        keys = self.multiplied_out(Keys(*kept))
        return Heads(q_THK, keys.k, keys.v, kept=kept, multiply_out=self.multiplied_out, q_latent_TR=latent_TR)

    def _absorbs(self, stream: Stream, reads_state: bool) -> bool:
        """Which form the step takes; the rule counts full attention, so a window multiplies out a little late."""
        if stream.memory is None:
            return False
        held = stream.memory.lengths
        return reads_state or (any(held) and not self.spec.multiplies(stream.lengths, held))

    def _rotated(self, q: Tensor, row_TR: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Queries ``[T, H, K]``, and what is kept of each token: its normalised latent beside the key all heads share,
        which is never normalised, ``[T, 1, R + rope]``.
        """
        spec = self.spec
        q_plain, q_turning = q.unflatten(-1, (spec.heads, -1)).split([spec.nope_dim, spec.rope_dim], dim=-1)
        latent_TR, k_turning = row_TR.split([spec.rank, spec.rope_dim], dim=-1)
        q_turned, k_turned = self.position(q_turning, k_turning[:, None], stream)
        normed_TR = self.kv_norm(latent_TR).to(row_TR.dtype)
        return torch.cat([q_plain, q_turned], dim=-1), torch.cat([normed_TR[:, None], k_turned], dim=-1)

    def multiplied_out(self, keys: Keys) -> Keys:
        """Kept rows as keys and values of all heads; ``[S, 1, R + rope]``, or buffers ``[B, 1, S, R + rope]``."""
        spec, row = self.spec, keys.k.squeeze(1)
        both = self.kv_b(row[..., : spec.rank]).unflatten(-1, (spec.heads, -1))
        k_plain, v = both.split([spec.nope_dim, spec.v_dim], dim=-1)
        k_turned = row[..., None, spec.rank :].expand(*k_plain.shape[:-1], -1)
        k = torch.cat([k_plain, k_turned], dim=-1)
        if keys.positions is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return replace(keys, k=k, v=v)

    def _absorbed(self, q_THK: Tensor) -> Tensor:
        """Queries that score kept rows as they are, ``[T, H, R + rope]``."""
        up_HKR = self._up_HFR()[:, : self.spec.nope_dim].to(q_THK.dtype)
        q_plain, q_turned = q_THK.split([self.spec.nope_dim, self.spec.rope_dim], dim=-1)
        return torch.cat([torch.einsum("thk,hkr->thr", q_plain, up_HKR), q_turned], dim=-1)

    def _up_HFR(self) -> Tensor:
        """``kv_b`` by head: rows of the key part, then of the value."""
        return self.kv_b.weight.unflatten(0, (self.spec.heads, -1))

    def output(self, o_THV: Tensor, heads: Heads) -> Tensor:
        """``[T, H, V] -> [T, D]``; what attention summed of latents first becomes values."""
        if heads.latent:
            up_HVR = self._up_HFR()[:, self.spec.nope_dim :].to(o_THV.dtype)
            o_THV = torch.einsum("thr,hvr->thv", o_THV, up_HVR)
        return self.o(o_THV.flatten(1))
