"""Small models over every combination of the tables, and the few calls that many tests make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention import Full, Mixer
from sextant.axes.capacity import Dense, Experts, FeedForward
from sextant.axes.kv import GQA, KV, POSITIONS
from sextant.axes.kv import TABLE as KVS
from sextant.axes.numerics import Numerics
from sextant.axes.routing import OVERFLOW, Dropless, Router, SelectionBias, SoftmaxTopK
from sextant.axes.routing import TABLE as ROUTING
from sextant.axes.stability import NormalInit, PreNorm
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.core.table import Table
from sextant.model.checks import check
from sextant.model.spec import Layer, ModelSpec
from sextant.model.transformer import Transformer

VOCAB, WIDTH = 23, 10
DENSE = Dense(hidden=9)
PLAIN = GQA(heads=4, kv_heads=2, head_dim=8)
MOE = Experts(experts=5, hidden=7, router=SoftmaxTopK(top_k=2), shared=3)


def examples(table: Table) -> list[Spec]:
    """Every example of every row."""
    return [example for row in table for example in row.examples]


def name(part: object) -> str:
    """A readable test id: kind and the fields that differ from their defaults, nested ones included."""
    if not isinstance(part, Spec):
        return str(part)
    fields = type(part).model_fields
    set_ = [(key, getattr(part, key)) for key in fields if key != "kind" and getattr(part, key) != fields[key].default]
    inner = ",".join(f"{key}={name(value)}" for key, value in set_)
    return f"{getattr(part, 'kind', 'spec')}({inner})" if inner else str(getattr(part, "kind", "spec"))


def params(parts: Iterable[object]) -> list[object]:
    """Pytest parameters with readable ids; a tuple becomes several arguments."""
    rows = [part if isinstance(part, tuple) else (part,) for part in parts]
    return [pytest.param(*row, id="-".join(name(part) for part in row)) for row in rows]


def model_spec(*layers: Layer, **fields: object) -> ModelSpec:
    """A tiny model with weights large enough that every part matters."""
    defaults = {"name": "tiny", "vocab": VOCAB, "width": WIDTH, "context": 4096, "init": NormalInit(std=0.4)}
    return ModelSpec.parse({**defaults, **fields, "layers": layers})


def combinations() -> Iterator[tuple[Spec, KV | None]]:
    """Attention with KV that the rules allow: every example with the plain GQA, one of every row with every KV example
    and with every position example. A linear mixer comes alone, because it projects itself.
    """
    seen = set()
    for row in ATTENTION:
        firsts = itertools.product(row.examples[:1], _kvs())
        for attention, kv in itertools.chain(itertools.product(row.examples, [PLAIN]), firsts):
            kv = None if isinstance(attention, Mixer) else kv
            if (attention, kv) not in seen and allowed(attention, kv):
                seen.add((attention, kv))
                yield attention, kv


def _kvs() -> Iterator[KV]:
    yield from examples(KVS)  # type: ignore[misc]
    yield from (PLAIN.replace(position=position) for position in examples(POSITIONS))


def allowed(attention: Spec, kv: KV | None) -> bool:
    """No rule refuses the pair."""
    try:
        check(model_spec(Layer.parse({"attention": attention, "kv": kv, "feed_forward": DENSE})))
    except UsageError:
        return False
    return True


@cache
def built(
    attention: Spec = Full(),  # noqa: B008 - frozen
    kv: KV | None = PLAIN,
    feed_forward: FeedForward = DENSE,
    layers: int = 2,
    residual: Spec = PreNorm(),  # noqa: B008
) -> Transformer:
    """A model in fp64, kept for the tests that ask for the same one; they must not change it."""
    layer = Layer.parse({"attention": attention, "kv": kv, "feed_forward": feed_forward, "residual": residual})
    return model_spec(*[layer] * layers).build(seed=3).double().eval()


def mixture(router: Router = SoftmaxTopK(top_k=2), overflow: Spec = Dropless()) -> Experts:  # noqa: B008 - frozen
    """Eight experts, which every router of the table can choose among."""
    return Experts.parse({"experts": 8, "hidden": 5, "router": router, "overflow": overflow, "shared": 3})


def mixtures() -> list[Experts]:
    """Every router beside the dropless rule, and every rule beside the plain router."""
    routers = [mixture(router) for router in examples(ROUTING)]  # type: ignore[arg-type]
    return list(dict.fromkeys([*routers, *(mixture(overflow=overflow) for overflow in examples(OVERFLOW))]))


def part(feed_forward: Experts) -> str:
    """The router or the rule that a mixture is here for, as a test id."""
    plain = feed_forward.router == mixture().router
    return name(feed_forward.overflow if plain else feed_forward.router)


def stirred(model: nn.Module, seed: int = 5) -> nn.Module:
    """The model as training leaves it: selection biases push some experts, and nothing that starts at 0 is still 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.4, generator=generator)
    for module in model.modules():
        if isinstance(module, SelectionBias):
            module.value_E.copy_(torch.randn(len(module.value_E), generator=generator) / 5)
    return model


def random_tokens(count: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """int64 ``[T]``."""
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Transformer, tokens_T: Tensor, lengths: list[int], memory: Memory | None = None) -> Tensor:
    """Logits ``[T, P]`` of sequences that lie end to end."""
    stream = Stream.of_lengths(lengths, memory=memory)
    return model.logits(model(tokens_T, stream).hidden_TD)


def chunked(model: Transformer, tokens_T: Tensor, sizes: Iterable[int], memory: Memory | None = None) -> Tensor:
    """Logits of one sequence that is fed piece by piece; the last piece takes what is left."""
    memory, pieces, at = memory or model.memory(1), [], 0
    for size in sizes:
        piece = tokens_T[at : at + size]
        if len(piece):
            pieces.append(run(model, piece, [len(piece)], memory))
        at += size
    if at < len(tokens_T):
        pieces.append(run(model, tokens_T[at:], [len(tokens_T) - at], memory))
    return torch.cat(pieces)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    """Equal within an absolute and relative tolerance; 1e-11 suits fp64."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def kept_bytes(spec: Mixer, numerics: Numerics, tokens: int) -> int:
    """Distinct memory that autograd keeps, less parameters, their casts and the input."""
    module = spec.build(64, numerics)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    owned = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    shapes = {tuple(p.shape) for p in module.parameters()} | {tuple(p.shape)[::-1] for p in module.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned and tuple(x.shape) not in shapes:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)
        return x

    x_TD = torch.randn(tokens, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(x_TD, Stream.of_lengths([tokens]), None)
    return sum(kept.values())
