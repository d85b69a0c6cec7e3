"""Which tensor is in which dtype, read off a real training step and held against the policy (spec mai-base-1 12.1).

One micro-batch of random tokens goes forward and backward through the model as the trainer sends it, and the run's
optimiser updates once. The scores inside a fused attention kernel cannot be read: how exact its result is tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sextant.axes.capacity.experts import ExpertsModule
from sextant.axes.numerics import DTYPES, FP32_PATHS
from sextant.axes.numerics.audit import Kind, Line, ProductWatch, Seen, in_front, line, pair_name
from sextant.axes.routing import RouterModule, Routing, SelectionBias
from sextant.axes.stability import Role, hidden_matrices, roles
from sextant.axes.stability.norm import LayerNormModule, RMSNormModule
from sextant.core.errors import NumericsError
from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.kernels import attention
from sextant.model.block import Block
from sextant.model.transformer import Transformer
from sextant.train.balance import Balance
from sextant.train.loss import micro_loss
from sextant.train.optim import Optimiser
from sextant.train.run import Run

LENGTHS = (97, 41)
"""Tokens of the documents of the step, at most the model's context."""


def audit(run: Run, model: Transformer) -> list[Line]:
    """A line for each path that stays fp32 and each kind of product; the model is updated once.

    Args:
        run: whose policy, loss and optimiser are used.
        model: built for it, where it is to run.
    """
    seen, named = Seen(), dict(model.named_parameters())
    optimiser = run.optimiser.build(model)
    with ProductWatch(named) as products:
        _step(run, model, optimiser, seen)
    for logits in products.softmaxes:
        if logits.shape[-1] == run.model.vocab:
            seen.add("output logits", "loss", logits)
    for name, parameter in named.items():
        seen.add("parameters", name, parameter)
    for name, state in optimiser.tensors().items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            seen.add("optimiser state", name, state)
        elif not name.endswith(".step"):
            seen.add("gradients", name, state)  # momentum is a sum of gradients
    seen.note("attention scores", "attention kernels", score_dtype(model))
    return [*_paths(run, seen), *_products(run, model, products)]


def require(lines: list[Line]) -> None:
    """Stop where the policy is broken.

    Raises:
        NumericsError: it names the first place and what it should have been.
    """
    broken = [one for one in lines if one.broken]
    if broken:
        first, count = broken[0], sum(len(one.broken) for one in broken)
        raise NumericsError(
            "the numerics policy is broken" + (f" in {count} places" if count > 1 else ""),
            where=f"{first.tensor}: {first.broken[0]}", expected=first.declared,
        )


# --- the step -------------------------------------------------------------------------------------------------------


def _step(run: Run, model: Transformer, optimiser: Optimiser, seen: Seen) -> None:
    """Forward, backward and update with eyes on everything."""
    device = model.embedding.weight.device
    lengths = [min(length, run.model.context) for length in LENGTHS]
    draw = torch.Generator().manual_seed(run.seed)
    tokens_T = torch.randint(run.model.vocab, (sum(lengths),), generator=draw).to(device)
    count, stream = len(tokens_T), Stream.of_lengths(lengths, device)
    with _watching(model.train(), seen) as hidden:
        loss = micro_loss(
            model, tokens_T, tokens_T.roll(-1), stream, Balance(run.model), count, count, run.mtp_weight_at(0)
        )
        loss.total.backward()
    seen.add("loss", "summed over tokens", loss.nats)
    seen.add("loss", "total", loss.total)
    seen.add("output logits", "head", model.logits(hidden[0]))
    for name, parameter in model.named_parameters():
        seen.add("gradients", name, parameter.grad)
    optimiser.step(1.0)
    run.numerics.after_step(model)


@contextmanager
def _watching(model: Transformer, seen: Seen) -> Iterator[list[Tensor]]:
    """Hooks on every module that has a path of the list; yields the final rows of each forward."""
    hidden: list[Tensor] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            look = _look(name, module, seen)
            if look is not None:
                handle = module.register_forward_hook(look)
                stack.callback(handle.remove)
        handle = model.register_forward_hook(lambda _m, _args, out: hidden.append(out.hidden_TD.detach()))
        stack.callback(handle.remove)
        names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        stack.enter_context(in_front(ExpertsModule, "routed", lambda args, out: _combined(seen, names, args, out)))
        yield hidden


def _look(name: str, module: nn.Module, seen: Seen) -> Callable[[Any, Any, Any], None] | None:
    """What to add when this module has run; None for modules without a path of their own."""
    if isinstance(module, RMSNormModule | LayerNormModule):
        return lambda _module, _args, out: seen.add("norms", name, out)
    if isinstance(module, Block):
        return lambda _module, args, out: seen.add("residual stream", name, args[0], out[0])
    if isinstance(module, RouterModule):
        return lambda own, args, out: _routed(seen, name, own, args[0], out)
    if name == "embedding":
        return lambda _module, _args, out: seen.add("embedding", name, out)
    return None


def _routed(seen: Seen, name: str, router: RouterModule, x_TD: Tensor, routing: Routing) -> None:
    biases = (module.value_E for module in router.modules() if isinstance(module, SelectionBias))
    seen.add("router", name, x_TD, *router.parameters(), *biases)
    seen.add("router", f"{name} logits", routing.logits_TE)
    seen.add("router", f"{name} gates", routing.probs_TE, routing.gates_TA)


def _combined(seen: Seen, names: dict[nn.Module, str], args: tuple[Any, ...], out: tuple[Tensor, object]) -> None:
    module, _, routing = args
    seen.add("expert combine", names[module], routing.gates_TA, out[0])


# --- the judgement --------------------------------------------------------------------------------------------------


def _paths(run: Run, seen: Seen) -> list[Line]:
    """The list of the policy; what the run's optimiser declares otherwise is held to that."""
    declared = {path: ("fp32", reason) for path, reason in FP32_PATHS.items()}
    if run.optimiser.low_moments:
        declared["optimiser state"] = ("bf16", "moments of AdamW, rounded at random: half the bytes; masters are fp32")
    return [line(seen, path, *declared[path]) for path in FP32_PATHS]


def _products(run: Run, model: Transformer, products: ProductWatch) -> list[Line]:
    """Three lines of the hidden matrices, one of all others."""
    seen, hidden, operands = Seen(), hidden_matrices(model), run.numerics.operands
    compute = DTYPES[run.numerics.compute or torch.float32]
    rest = "fp32" if compute == "fp32" else f"{compute} or fp32"
    for name, kinds in products.met.items():
        for kind, pairs in kinds.items():
            for pair in pairs:
                seen.note(kind if name in hidden else _other(name, model), name, pair_name(pair))
    lines = [
        line(seen, kind, pair_name(pair), reason)
        for kind, pair, reason in zip(KINDS, operands[:3], operands.reasons, strict=True)
    ]
    return [
        *(replace(one, tensor=f"hidden matrices, {one.tensor}") for one in lines),
        line(seen, HEAD, compute, "few of all products, and a logit takes part in every loss"),
        line(seen, ROUTER, "fp32", "rounded logits choose other experts"),
        line(seen, REST, rest, "small; what scores blocks is fp32 as routers are"),
    ]


KINDS: tuple[Kind, ...] = ("forward", "data gradient", "weight gradient")
HEAD, ROUTER, REST = "head, all products", "router, all products", "other parameters, all products"


def _other(name: str, model: Transformer) -> str:
    role = roles(model)[name]
    return HEAD if role in (Role.HEAD, Role.EMBEDDING) else ROUTER if role is Role.ROUTER else REST


def score_dtype(model: Transformer, tokens: int = 64) -> str:
    """What the attention kernels of this device score in, told from how exact they are in the compute dtype.

    Scores that were rounded to bf16 make the result far worse than its own rounding does.
    """
    compute, device = model.numerics.compute or torch.float32, model.embedding.weight.device
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(tokens, 2, 16, generator=draw).to(device, compute) for _ in range(3))
    span, how = attention.Span(), attention.Scores(2.0)
    want = attention.attend_ragged(q.double(), k.double(), v.double(), [tokens], span, how)
    got = attention.attend(q, Keys(k, v), Stream.of_lengths([tokens], device), span, how)
    off, rounding = (_rms(x.double() - want) for x in (got, want.to(compute)))
    slack = 1.3 if compute.itemsize == 2 else 20
    return "fp32" if off < slack * rounding else DTYPES[compute] if compute.itemsize == 2 else "bf16"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
