"""The audit of a step: what it reads under every policy, and that it sees each way of breaking one."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from cases import model_spec, params
from typer.main import get_command

from sextant import recipes
from sextant.axes.capacity import Dense, Experts, LatentExperts
from sextant.axes.capacity.experts import ExpertsModule
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, FP32, FP32_PATHS, FP8Blocks, FP8Delayed
from sextant.axes.numerics.audit import in_front
from sextant.axes.routing import RouterModule, SigmoidTopK
from sextant.axes.stability import NormalInit, RMSNorm, SandwichNorm, hidden_matrices
from sextant.axes.stability.norm import RMSNormModule
from sextant.cli import app, frame
from sextant.core.errors import NumericsError
from sextant.model.spec import Layer
from sextant.train import audit as audits
from sextant.train.audit import audit, require
from sextant.train.optim import AdamW, Muon

SPEC = model_spec(
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm()), feed_forward=Dense(hidden=24)),
    Layer(
        kv=GQA(heads=4, kv_heads=2, head_dim=8), residual=SandwichNorm(),
        feed_forward=Experts(experts=4, hidden=16, shared=8, router=SigmoidTopK(top_k=2, bias=True)),
    ),
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8), feed_forward=LatentExperts(experts=4, hidden=16, latent=8)),
    width=32, init=NormalInit(std=0.1),
)
pytestmark = pytest.mark.usefixtures("half_products")
KINDS = [f"hidden matrices, {kind}" for kind in audits.KINDS]


def run(numerics=BF16(), optimiser=AdamW()):  # noqa: B008 - frozen
    twin = recipes.get("nano").twin()
    return twin.replace(model=SPEC, numerics=numerics, optimiser=optimiser)


def read(run, model=None):
    lines = audit(run, model or SPEC.build(run.numerics, seed=1))
    return {line.tensor: line for line in lines}


@pytest.mark.parametrize("policy", params([FP32(), BF16(), FP8Delayed(), FP8Blocks()]))
def test_every_path_of_the_list_is_read_and_fp32(policy):
    """The declared list and the list that is read are one list, so a new path needs a new look."""
    lines = read(run(policy))
    assert [tensor for tensor in lines if tensor in FP32_PATHS] == list(FP32_PATHS)
    assert {lines[path].met for path in FP32_PATHS} == {("fp32",)}
    require(list(lines.values()))


E4, E5_E4, HALF = "e4m3", "e5m2 by e4m3", "bf16"


@pytest.mark.parametrize(
    ("policy", "formats"),
    params([
        (FP32(), ("fp32", "fp32", "fp32")),
        (BF16(), (HALF, HALF, HALF)),
        (FP8Delayed(), (E4, E5_E4, HALF)),
        (FP8Delayed(data_gradient="e4m3"), (E4, E4, HALF)),
        (FP8Delayed(forward="bf16"), (HALF, E5_E4, HALF)),
        (FP8Delayed(data_gradient="bf16"), (E4, HALF, HALF)),
        (FP8Blocks(), (E4, E4, E4)),
    ]),
)
def test_operands_of_every_hidden_matrix(policy, formats):
    """MAI: E4M3 forward, E5M2 by E4M3 backward, weight gradients in bf16. DeepSeek-V3: E4M3 for all three."""
    lines = read(run(policy))
    assert tuple(lines[kind].met for kind in KINDS) == tuple((one,) for one in formats)
    assert lines[audits.HEAD].met == (("fp32",) if policy == FP32() else ("bf16",))
    assert lines[audits.ROUTER].met == ("fp32",)


def test_every_hidden_matrix_is_met_in_all_three_products(monkeypatch):
    found = {}
    plain = audits._products
    monkeypatch.setattr(audits, "_products", lambda *args: found.update(args[2].met) or plain(*args))
    model = SPEC.build(FP8Delayed(), seed=1)
    read(run(FP8Delayed()), model)
    hidden = hidden_matrices(model)
    assert len(hidden) == 24
    assert {matrix: set(found[matrix]) for matrix in hidden} == {matrix: set(audits.KINDS) for matrix in hidden}


@pytest.mark.parametrize("recipe", ["deepseek-v3", "mai-base-1", "minimax-text-01", "nsa-27b", "seer-attention"])
def test_twins_keep_the_policy(recipe):
    """Latent attention and prediction modules, latent experts, linear mixers, parts of their own, fp32 gates."""
    twin = recipes.get(recipe).twin().replace(numerics=FP8Blocks())
    lines = audit(twin, twin.model.build(twin.numerics, seed=1))
    assert all(line.met == ("e4m3",) for line in lines if line.tensor in KINDS)
    require(lines)


@pytest.mark.parametrize("optimiser", params([AdamW(moments="bf16"), Muon(adamw=AdamW(moments="bf16"))]))
def test_low_moments_are_declared_by_the_optimiser(optimiser):
    line = read(run(optimiser=optimiser))["optimiser state"]
    assert (line.declared, line.met, line.broken) == ("bf16", ("bf16",), ())


# --- broken on purpose ----------------------------------------------------------------------------------------------


def low_router(model, patch):
    low = lambda self, x_TD: F.linear(x_TD.bfloat16(), self.weight.bfloat16())  # noqa: E731
    patch.setattr(RouterModule, "logits", low)
    return "router", "blocks.1.feed_forward.router logits (bf16)"


def low_residual(model, patch):
    model.blocks[1].register_forward_hook(lambda m, args, out: (out[0].bfloat16(), *out[1:]))
    return "residual stream", "blocks.2 (bf16)"


def low_norm(model, patch):
    plain = RMSNormModule.forward
    patch.setattr(RMSNormModule, "forward", lambda self, x: plain(self, x).bfloat16())
    return "norms", "norm (bf16)"


def low_combine(model, patch):
    plain = ExpertsModule.routed

    def routed(self, x_TD, routing):
        y_TD, usage = plain(self, x_TD, routing)
        return y_TD.bfloat16(), usage

    patch.setattr(ExpertsModule, "routed", routed)
    return "expert combine", "blocks.1.feed_forward (bf16)"


def low_master(model, patch):
    model.blocks[0].feed_forward.down.bfloat16()
    return "parameters", "blocks.0.feed_forward.down.weight (bf16)"


def low_logits(model, patch):
    plain = type(model).logits
    patch.setattr(type(model), "logits", lambda self, hidden_TD: plain(self, hidden_TD).bfloat16())
    return "output logits", "head (bf16)"


def plain_matrix(model, patch):
    model.blocks[0].attention.kv.q.product = None
    return "hidden matrices, forward", "blocks.0.attention.kv.q.weight (bf16)"


BREAKS = [low_router, low_residual, low_norm, low_combine, low_master, low_logits, plain_matrix]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
def test_a_broken_policy_is_named(broken, monkeypatch):
    model = SPEC.build(FP8Delayed(), seed=1)
    tensor, place = broken(model, monkeypatch)
    lines = read(run(FP8Delayed()), model)
    assert place in lines[tensor].broken
    with pytest.raises(NumericsError, match="policy is broken") as error:
        require(list(lines.values()))
    assert error.value.exit_code == 5


def test_rounded_scores_are_heard(monkeypatch):
    from sextant.kernels import attention

    plain = attention.attend

    def rounded(q, keys, stream, span, scores):
        noise = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)) / 128
        return plain((q * (1 + noise)).to(q.dtype), keys, stream, span, scores)

    monkeypatch.setattr(attention, "attend", rounded)
    for policy, heard in ((BF16(), "bf16"), (FP32(), "bf16")):
        assert audits.score_dtype(SPEC.build(policy)) == heard


def test_what_stood_in_front_is_gone_again():
    plain = ExpertsModule.routed
    with pytest.raises(ValueError), in_front(ExpertsModule, "routed", lambda args, out: None):
        assert ExpertsModule.routed is not plain
        raise ValueError
    assert ExpertsModule.routed is plain
    model = SPEC.build(BF16())
    read(run(), model)
    assert not any(module._forward_hooks for module in model.modules())


# --- the command ----------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    return frame.run(get_command(app), ["audit", *words, "--device", "cpu"], False)


def test_command_prints_tensor_dtype_reason(capsys):
    assert command("nano", "--numerics", "fp8_delayed", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    lines = {line["tensor"]: line for line in facts["tensors"]}
    assert facts["numerics"]["kind"] == "fp8_delayed" and set(FP32_PATHS) < set(lines)
    assert lines["hidden matrices, data gradient"]["met"] == ["e5m2 by e4m3"]
    assert all(line["reason"] for line in lines.values())
    assert command("nano", "--numerics", "bf16") == 0
    assert "residual stream" in capsys.readouterr().out


def test_command_fails_where_the_policy_is_broken(capsys, monkeypatch):
    low_norm(None, monkeypatch)
    assert command("nano", "--numerics", "bf16") == 5
    said = capsys.readouterr()
    assert "norms" in said.out
    assert re.match(r"error: the numerics policy is broken in \d+ places: norms: blocks.0.* \(bf16\)", said.err)
    assert "(expected fp32)" in said.err
