"""muP: its table, what it makes of widths in training, the router's rule (2203.03466; spec mai-base-1, section 11)."""

import math

import pytest
import torch
from cases import close, model_spec, random_tokens
from torch import Tensor

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.stability import MuPInit, NormalInit, Role
from sextant.axes.stability.init import Matrix, Rule
from sextant.convert.hf import export_weights, import_weights
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer
from sextant.train.optim import AdamW, Decay

BASE = 32


def line(init, role: Role, width: int) -> Rule:
    return init.rule(Matrix(role, inputs=width, outputs=4 * width, values=False, width=width, layers=4))


def test_table():
    """Role by role, at four times the base's width."""
    init = MuPInit(base_width=BASE, std=0.02)
    for role in (Role.ATTENTION_IN, Role.ATTENTION_OUT, Role.FF_IN, Role.FF_OUT):
        assert line(init, role, 4 * BASE) == Rule(std=0.01, rate=0.25, decay=4.0)
    assert line(init, Role.ROUTER, 4 * BASE) == Rule(std=0.005, rate=0.25, decay=4.0)
    assert line(init, Role.EMBEDDING, 4 * BASE) == line(init, Role.HEAD, 4 * BASE) == Rule(std=0.02)
    assert line(init.replace(head_std=0.0), Role.HEAD, 4 * BASE) == Rule(std=0.0)
    assert init.head_scale(4 * BASE) == 0.25
    assert MuPInit(base_width=BASE, base_head_dim=16).score_scale(64) == pytest.approx(4 / 64)
    assert MuPInit(base_width=BASE).score_scale(64) == pytest.approx(1 / 8)


@pytest.mark.parametrize("tied", [True, False])
def test_at_the_base_it_is_the_plain_start(tied):
    """Same draws, same logits: nothing is scaled at width D0."""
    models = [sized(BASE, init, tied=tied) for init in (MuPInit(base_width=BASE, std=0.1), NormalInit(std=0.1))]
    one, other = (logits(model, random_tokens(12)) for model in models)
    assert torch.equal(one, other)


@pytest.mark.parametrize("tied", [True, False])
def test_head_scale_reaches_logits_and_loss(tied):
    """Logits and gradients are those of the same weights under a plain head, with rows over r."""
    tokens_T = random_tokens(12)
    scaled = sized(64, MuPInit(base_width=BASE, std=0.2), tied=tied).double()
    plain = sized(64, NormalInit(), tied=tied).double()
    plain.load_state_dict(scaled.state_dict())
    hidden_TD = plain(tokens_T, Stream.of_lengths([12])).hidden_TD
    close(logits(scaled, tokens_T), plain.logits(hidden_TD / 2))
    want = torch.nn.functional.cross_entropy(plain.logits(hidden_TD / 2), tokens_T.roll(-1), reduction="sum")
    loss = summed_loss(scaled(tokens_T, Stream.of_lengths([12])).hidden_TD, scaled.head_PD, tokens_T.roll(-1))
    close(loss, want)
    loss.backward()
    want.backward()
    for name, parameter in plain.named_parameters():
        close(scaled.get_parameter(name).grad, parameter.grad)


def sized(width: int, init, *, tied: bool = False, experts: bool = False):
    """A model in which all that may grow grows with the width: heads and hidden units."""
    heads = width // 8
    ff = Experts(experts=4, hidden=width) if experts else Dense(hidden=2 * width)
    layer = Layer(kv=GQA(heads=heads, kv_heads=heads, head_dim=8), feed_forward=ff)
    return model_spec(*[layer] * 2, width=width, init=init, tied=tied).build(seed=1)


def logits(model, tokens_T: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens_T, Stream.of_lengths([len(tokens_T)])).hidden_TD)


WIDTHS, STEPS, SEEDS = (32, 64, 128, 256), 4, 3


def changes(width: int, init, seed: int, experts: bool) -> dict[str, float]:
    """Mean absolute change, after some steps of Adam, of the rows after each block and of the logits."""
    model = sized(width, init, experts=experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in model.init_table.values():  # another draw by the same table
            for part in parts:
                part.view.normal_(0.0, part.rule.std, generator=generator)
    tokens_T, stream = random_tokens(64, seed), Stream.of_lengths([64])
    seen: dict[str, list[Tensor]] = {"logits": []}
    for index, block in enumerate(model.blocks):
        rows = seen.setdefault(f"block {index}", [])
        block.register_forward_hook(lambda module, args, out, rows=rows: rows.append(out[0].detach()))
    optimiser = AdamW(lr=2e-3, decay=Decay(default=0.0)).build(model)
    for step in range(STEPS + 1):
        hidden_TD = model(tokens_T, stream).hidden_TD
        seen["logits"].append(model.logits(hidden_TD).detach())
        if step < STEPS:
            (summed_loss(hidden_TD, model.head_PD, tokens_T.roll(-1)) / 64).backward()
            optimiser.step(1.0)
    return {name: (rows[-1] - rows[0]).abs().mean().item() for name, rows in seen.items()}


def slopes(init, experts: bool = False) -> dict[str, float]:
    """Slope of the log of each change over the log of the width."""
    found = [[changes(width, init, seed, experts) for seed in range(SEEDS)] for width in WIDTHS]
    x = torch.tensor(WIDTHS, dtype=torch.float64).log2()
    x = x - x.mean()
    result = {}
    for name in found[0][0]:
        y = torch.tensor([sum(one[name] for one in seeds) / SEEDS for seeds in found], dtype=torch.float64).log2()
        result[name] = ((x * y).sum() / (x * x).sum()).item()
    return result


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_coordinate_check(experts):
    """What training changes is as large at any width under muP, within 0.1 in the exponent; and grows without it."""
    mup = slopes(MuPInit(base_width=BASE, std=0.1, head_std=0.0), experts)
    plain = slopes(NormalInit(std=0.1), experts)
    for name in mup:
        print(f"{name}: exponent in the width {mup[name]:+.3f} under muP, {plain[name]:+.3f} without")
    assert max(abs(slope) for slope in mup.values()) < 0.1
    assert max(plain.values()) > 0.4


def test_router_line_is_the_head_line_to_adam():
    """A start and rate over r are the same function and the same steps as 1/r on the scores."""
    r, rate = 4.0, 1e-2
    torch.manual_seed(0)
    x_TD, want_TE = torch.randn(40, 16, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    start_ED = torch.randn(5, 16, dtype=torch.float64)
    traces = []
    for forward in (1 / r, 1.0):
        own = 1 / r / forward  # what the start and the rate take over
        weight_ED = (start_ED * own).requires_grad_()
        adam = torch.optim.Adam([weight_ED], lr=rate * own, eps=0.0)
        for _ in range(5):
            adam.zero_grad()
            scores_TE = forward * (x_TD @ weight_ED.t())
            (scores_TE - want_TE).square().mean().backward()
            adam.step()
        traces.append(forward * (x_TD @ weight_ED.t()).detach())
    close(*traces, 1e-10)


def test_export_takes_the_heads_factor_into_the_matrix():
    """A file cannot say it: the model read back has the same logits; a tied one is refused."""
    model = sized(64, MuPInit(base_width=BASE, std=0.2))
    again = sized(64, NormalInit())
    import_weights(again, export_weights(model, "llama"), "llama")
    close(logits(again, random_tokens(12)), logits(model, random_tokens(12)), 1e-5)
    with pytest.raises(UsageError, match="tied head with a factor"):
        export_weights(sized(64, MuPInit(base_width=BASE), tied=True), "llama")


def test_router_starts_and_learns_as_its_line_says():
    model = sized(128, MuPInit(base_width=BASE, std=0.1), experts=True)
    (part,) = model.init_table["blocks.0.feed_forward.router.weight"]
    assert part.rule == Rule(std=0.025, rate=0.25, decay=4.0)
    assert part.view.std().item() == pytest.approx(0.025, rel=5 / math.sqrt(2 * part.view.numel()))
