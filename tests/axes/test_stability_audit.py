"""The audit of a start: sound models pass, every way to be wrong is found, joint matrices are known by their parts."""

import math

import pytest
import torch
from cases import DENSE, PLAIN, examples, model_spec, name, random_tokens

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention import Full, GatedDelta, Lightning, Mixer
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, MLA
from sextant.axes.kv import TABLE as KVS
from sextant.axes.stability import INITS, DeepNorm, DeepNormInit, LayerNorm, ReZero, RMSNorm, Role, SandwichNorm
from sextant.axes.stability.audit import audit, require_start
from sextant.core.cost import At
from sextant.core.errors import NumericsError
from sextant.core.stream import Stream
from sextant.model.spec import Layer
from sextant.recipes import RECIPES


def twins():
    """Each small twin once: several names share a model."""
    seen = {}
    for recipe in RECIPES:
        model = recipe.twin().model
        if model.cost(At(1)).params < 3e6:
            seen.setdefault(model.replace(name="twin"), pytest.param(model, id=recipe.name))
    return list(seen.values())


@pytest.mark.parametrize("spec", twins())
def test_every_twin_starts_as_declared(spec):
    model = spec.build(seed=4)
    found = audit(model)
    assert [finding for finding in found if not finding.ok] == []
    assert {finding.parameter for finding in found} == {path for path, _ in model.named_parameters()}
    assert sum(finding.count for finding in found) == sum(p.numel() for p in model.parameters())


def mixed(init):
    """Joint matrices, experts, biases, taps and scales in one model."""
    feed_forward = Experts(experts=4, hidden=24, shared=16)
    layers = [
        Layer(attention=Lightning(heads=4, head_dim=8, chunk=16), feed_forward=feed_forward, residual=ReZero()),
        Layer(attention=GatedDelta(key_heads=2, value_heads=4, head_dim=8, value_dim=12), feed_forward=DENSE),
        Layer(kv=MLA(heads=4, rank=16, nope_dim=8, rope_dim=4, v_dim=12), feed_forward=DENSE, residual=DeepNorm()),
        Layer(
            kv=GQA(heads=4, kv_heads=2, head_dim=8, bias=True, qk_norm=RMSNorm(unit_offset=True)), feed_forward=DENSE,
            residual=SandwichNorm(norm=LayerNorm(), attention_gain=0.0),
        ),
    ]
    return model_spec(*layers, width=48, init=init)


@pytest.mark.parametrize("init", examples(INITS), ids=name)
def test_every_scheme_passes_on_a_mixed_model(init):
    model = mixed(init).build(seed=2)
    require_start(model)
    assert {finding.role for finding in audit(model)} == set(Role)


WRONG = {
    "spread": ("blocks.0.attention.mixer.gate.weight", lambda p: p.mul_(1.2)),
    "shifted": ("blocks.0.feed_forward.experts.up_EDF", lambda p: p.add_(0.01)),
    "values as queries": ("blocks.0.attention.mixer.qkv.weight", lambda p: p.normal_(std=p[:8].std().item())),
    "gain": ("blocks.2.around_attention.norm.gain", lambda p: p[3].add_(1e-3)),
    "stored offset": ("blocks.3.attention.kv.q_norm.gain", lambda p: p.fill_(1.0)),
    "zero gain": ("blocks.3.around_attention.norm_out.gain", lambda p: p.fill_(1.0)),
    "scale": ("blocks.0.around_attention.scale", lambda p: p.fill_(1.0)),
    "bias": ("blocks.3.attention.kv.v.bias", lambda p: p[0].fill_(1e-4)),
    "own tap": ("blocks.1.attention.mixer.core.conv.weight", lambda p: p[5, 0, -1].fill_(0.5)),
    "decay": ("blocks.1.attention.mixer.forget.rate_log_H", lambda p: p[1].zero_()),
    "dead": ("head.weight", lambda p: p.zero_()),
    "not a number": ("embedding.weight", lambda p: p[0].fill_(math.nan)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_start_is_found(wrong):
    path, how = WRONG[wrong]
    model = mixed(DeepNormInit(std=0.05)).build(seed=2)
    with torch.no_grad():
        how(model.get_parameter(path))
    assert {finding.parameter for finding in audit(model) if not finding.ok} == {path}
    with pytest.raises(NumericsError, match=r"does not start as declared: " + path.replace(".", r"\.")):
        require_start(model)


def test_audit_leaves_the_model_alone():
    model = mixed(DeepNormInit()).build(seed=2)
    before = {path: p.clone() for path, p in model.state_dict().items()}
    audit(model)
    assert all(torch.equal(before[path], p) for path, p in model.state_dict().items())


def test_deep_norm_start_by_hand():
    """Xavier by matrix, joint or not, and (8 L)^(-1/4) on feed-forward, values and outputs alone."""
    model, gain = mixed(DeepNormInit(std=0.05)).build(seed=2), (8 * 4) ** -0.25
    stds = {path: [part.rule.std for part in parts] for path, parts in model.init_table.items()}

    def xavier(inputs, outputs):
        return math.sqrt(2 / (inputs + outputs))

    assert stds["blocks.3.attention.kv.q.weight"] == pytest.approx([xavier(48, 32)])
    assert stds["blocks.3.attention.kv.k.weight"] == pytest.approx([xavier(48, 16)])
    assert stds["blocks.3.attention.kv.v.weight"] == pytest.approx([gain * xavier(48, 16)])
    assert stds["blocks.3.attention.kv.o.weight"] == pytest.approx([gain * xavier(32, 48)])
    assert stds["blocks.0.attention.mixer.qkv.weight"] == pytest.approx([xavier(48, 32), gain * xavier(48, 32)])
    assert stds["blocks.0.feed_forward.experts.up_EDF"] == pytest.approx([gain * xavier(48, 24)])
    assert stds["blocks.0.feed_forward.experts.down_EFD"] == pytest.approx([gain * xavier(24, 48)])
    assert stds["blocks.0.feed_forward.router.weight"] == stds["embedding.weight"] == stds["head.weight"] == [0.05]


def marked():
    """Every attention whose values come from rows that it marks."""
    for attention in examples(ATTENTION):
        kv = None if isinstance(attention, Mixer) else PLAIN
        if attention.kind != "nsa":  # its compressed values have a place of their own, which rows of zeros keep
            yield pytest.param(attention, kv, id=name(attention))
    for kv in examples(KVS):
        yield pytest.param(Full(), kv, id=name(kv))


@pytest.mark.parametrize(("attention", "kv"), list(marked()))
def test_marked_rows_make_the_values(attention, kv):
    """With those rows at zero attention gives nothing; with the unmarked rows of joint matrices at zero, it may."""
    layer = Layer.parse({"attention": attention, "kv": kv, "feed_forward": Dense(hidden=8)})
    model = model_spec(layer).build(seed=3)
    parts = [part for path, parts in model.init_table.items() for part in parts if ".attention." in path]
    values = [part.view for part in parts if part.matrix.values]
    assert values
    tokens_T, out = random_tokens(40), []
    model.blocks[0].attention.register_forward_hook(lambda module, args, got: out.append(got[0]))
    with torch.no_grad():
        model(tokens_T, Stream.of_lengths([40]))
        for view in values:
            view.zero_()
        model(tokens_T, Stream.of_lengths([40]))
    assert (out[0] != 0).any() and not (out[1] != 0).any()
