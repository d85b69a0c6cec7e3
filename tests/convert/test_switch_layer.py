"""Switch's sparse layer against transformers in fp32: drops by position, outputs, gradients, and both its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_hf import gap
from torch import Tensor, nn

from sextant.axes.capacity import Experts
from sextant.axes.numerics import FP32
from sextant.axes.routing import Auxiliary, Routing, Switch, ZLoss
from sextant.axes.routing.overflow import Capacity
from sextant.convert.maps import SWITCH_EXPERTS
from sextant.core.stream import Stream

WIDTH, HIDDEN, EXPERTS, LENGTH, BATCH = 16, 20, 5, 24, 3
CLOSE = 1e-5
MLP = "encoder.block.0.layer.1.mlp."


def their_layer(capacity: int) -> Any:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    layer = SwitchTransformersSparseMLP(SwitchTransformersConfig(
        d_model=WIDTH, d_ff=HIDDEN, num_experts=EXPERTS, expert_capacity=capacity, router_bias=False,
        feed_forward_proj="relu", dropout_rate=0.0, router_jitter_noise=0.0,
    )).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def names_on_disk(ours: str) -> tuple[Any, list[str]]:
    row = next(row for row in SWITCH_EXPERTS if row.ours == f"blocks.{{i}}.feed_forward.{ours}")
    experts = range(EXPERTS if "{e}" in row.their_names[0] else 1)
    return row.move, [name.format(i=0, e=e).removeprefix(MLP) for e in experts for name in row.their_names]


def taken(ours: str, tensors: dict[str, Tensor]) -> Tensor:
    move, names = names_on_disk(ours)
    return move.join([tensors[name] for name in names], EXPERTS)


def our_layer(theirs: Any, capacity: int) -> nn.Module:
    """``C = factor * T / E``: the factor that gives so many places in a sequence of this length, also in evaluation."""
    factor = capacity * EXPERTS / LENGTH
    overflow = Capacity(factor=factor, eval_factor=factor, order="position", group="sequence")
    spec = Experts(
        experts=EXPERTS, hidden=HIDDEN, router=Switch(jitter=0.0), overflow=overflow, activation="relu"
    )
    layer, disk = spec.build(WIDTH, FP32()), theirs.state_dict()
    assert sum(len(names_on_disk(name)[1]) for name, _ in layer.named_parameters()) == len(disk)
    layer.load_state_dict({name: taken(name, disk) for name, _ in layer.named_parameters()})
    return layer.eval()


def rows() -> tuple[Tensor, Tensor]:
    """With a common direction, so that experts are loaded unevenly."""
    torch.manual_seed(4)
    return torch.randn(BATCH, LENGTH, WIDTH) + 0.5 * torch.randn(WIDTH), torch.randn(BATCH, LENGTH, WIDTH)


def stream() -> Stream:
    return Stream.of_lengths([LENGTH] * BATCH)


def their_choice(layer: Any, x_BTD: Tensor) -> Tensor:
    """The router's one-hot choice, where a dropped token has none."""
    return next(part for part in layer.router(x_BTD) if not part.is_floating_point())


@pytest.mark.parametrize("capacity", [2, 7, LENGTH])
def test_outputs_drops_and_gradients(capacity: int):
    torch.manual_seed(1)
    theirs, (x_BTD, upstream_BTD) = their_layer(capacity), rows()
    if their_choice(theirs, x_BTD).shape[-2] == 1:  # transformers 5.17 counts places along this axis: it never drops
        capacity = LENGTH
    ours = our_layer(theirs, capacity)
    x_BTD.requires_grad_()
    want_BTD = theirs(x_BTD)
    got_TD, routing = ours(x_BTD.flatten(0, 1), stream())
    kept_BT = their_choice(theirs, x_BTD).view(BATCH, LENGTH, EXPERTS).any(-1)
    assert torch.equal(kept_BT.flatten(), routing.kept_TA[:, 0])
    assert (routing.dropped() > 0) == (capacity < LENGTH)
    got_BTD = got_TD.unflatten(0, (BATCH, -1))
    assert gap(got_BTD[kept_BT], want_BTD[kept_BT]) < CLOSE and not got_BTD[~kept_BT].any()
    upstream_BTD = upstream_BTD * kept_BT[..., None]  # some versions hand a dropped token on, some give 0

    names = [name for name, _ in theirs.named_parameters()]
    grads = torch.autograd.grad(want_BTD, [x_BTD, *theirs.parameters()], upstream_BTD, allow_unused=True)
    unmet = dict(theirs.named_parameters())
    disk = {name: torch.zeros_like(unmet[name]) if g is None else g for name, g in zip(names, grads[1:], strict=True)}
    expected = {"x": grads[0]} | {name: taken(name, disk) for name, _ in ours.named_parameters()}
    leaves = {"x": x_BTD, **dict(ours.named_parameters())}
    upstream_TD = upstream_BTD.flatten(0, 1)
    got = dict(zip(leaves, torch.autograd.grad(got_TD, list(leaves.values()), upstream_TD), strict=True))
    gaps = {name: gap(got[name], expected[name]) for name in leaves}
    assert max(gaps.values()) < CLOSE, max(gaps.items(), key=lambda item: item[1])


def test_losses():
    """Theirs is per sequence, then averaged, and its factor is ours; the z-loss likewise."""
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    torch.manual_seed(2)
    logits_BTE = torch.randn(BATCH, LENGTH, EXPERTS, requires_grad=True)
    probs_BTE = logits_BTE.softmax(-1)
    best_BT1 = probs_BTE.argmax(-1, keepdim=True)
    probs_TE, chosen_TA = probs_BTE.flatten(0, 1), best_BT1.flatten(0, 1)
    routing = Routing(logits_BTE.flatten(0, 1), probs_TE, chosen_TA, probs_TE.gather(1, chosen_TA))
    tokens = BATCH * LENGTH
    pairs = [
        (Auxiliary(coef=1.0, scope="sequence", counts="first"), theirs.load_balancing_loss_func(probs_BTE, best_BT1)),
        (ZLoss(coef=1.0), theirs.router_z_loss_func(logits_BTE)),
    ]
    for term, want in pairs:
        got = term.loss(routing, stream(), None, tokens)
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        grads = [torch.autograd.grad(loss, logits_BTE, retain_graph=True)[0] for loss in (got, want)]
        assert gap(*grads) < CLOSE
