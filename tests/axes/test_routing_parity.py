"""Our routers against those of transformers, weights copied, fp32: logits, experts, gates, gradients (MOE-13)."""

import os

import pytest
import torch
from torch import Tensor, nn

from sextant.axes.routing import Groups, Router, Routing, SigmoidTopK, SoftmaxTopK, Switch

os.environ["HF_HUB_OFFLINE"] = "1"
EXPERTS, WIDTH, TOKENS = 16, 32, 400


def config(name: str, **fields: object) -> object:
    import transformers

    return getattr(transformers, name)(hidden_size=WIDTH, **fields)


def deepseek_v3(**fields: object) -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    return DeepseekV3TopkRouter(config(
        "DeepseekV3Config", n_routed_experts=EXPERTS, num_experts_per_tok=4, n_group=8, topk_group=3, **fields
    ))


def deepseek_v2(method: str) -> nn.Module:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    return DeepseekV2TopkRouter(config(
        "DeepseekV2Config", n_routed_experts=EXPERTS, num_experts_per_tok=4, n_group=8, topk_group=3,
        topk_method=method, routed_scaling_factor=16.0,
    ))


def of_top_k(family: str, name: str, **fields: object) -> nn.Module:
    from importlib import import_module

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, f"{name}TopKRouter")(config(f"{name}Config", num_experts_per_tok=4, **fields))


GROUPS = Groups(count=8, kept=3)
CASES = {
    "deepseek-v3": (lambda: deepseek_v3(), SigmoidTopK(top_k=4, scale=2.5, groups=GROUPS.replace(score="top2"))),
    "deepseek-v3 raw": (
        lambda: deepseek_v3(norm_topk_prob=False),
        SigmoidTopK(top_k=4, scale=2.5, normalize=False, groups=GROUPS.replace(score="top2")),
    ),
    "deepseek-v2": (lambda: deepseek_v2("group_limited_greedy"), SoftmaxTopK(top_k=4, scale=16.0, groups=GROUPS)),
    "deepseek-v2-lite": (lambda: deepseek_v2("greedy"), SoftmaxTopK(top_k=4, scale=16.0)),
    "mixtral": (
        lambda: of_top_k("mixtral", "Mixtral", num_local_experts=EXPERTS), SoftmaxTopK(top_k=4, normalize=True),
    ),
    "minimax": (
        lambda: of_top_k("minimax", "MiniMax", num_local_experts=EXPERTS), SoftmaxTopK(top_k=4, normalize=True),
    ),
    "qwen3-moe": (
        lambda: of_top_k("qwen3_moe", "Qwen3Moe", num_experts=EXPERTS, norm_topk_prob=True),
        SoftmaxTopK(top_k=4, normalize=True),
    ),
    "olmoe": (lambda: of_top_k("olmoe", "Olmoe", num_experts=EXPERTS, norm_topk_prob=False), SoftmaxTopK(top_k=4)),
}


def pair(make, spec: Router, offset: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours with the same random matrix and bias."""
    theirs, ours, generator = make(), spec.build(WIDTH, EXPERTS), torch.Generator().manual_seed(0)
    nn.init.normal_(theirs.weight, std=0.3, generator=generator)
    ours.weight.data.copy_(theirs.weight.data)
    if isinstance(spec, SigmoidTopK):
        theirs.e_score_correction_bias.normal_(mean=offset, std=0.2, generator=generator)
        ours.bias.load_state_dict({"value_E": theirs.e_score_correction_bias})
    return theirs, ours


def by_expert(experts_TA: Tensor, gates_TA: Tensor) -> Tensor:
    """Gates in their expert's place, ``[T, E]``: theirs come in no order."""
    return torch.zeros(len(experts_TA), EXPERTS).scatter(1, experts_TA, gates_TA)


@pytest.mark.parametrize("offset", [0.0, -4.0])
@pytest.mark.parametrize("case", CASES)
def test_router_equals_theirs(case, offset):
    make, spec = CASES[case]
    theirs, ours = pair(make, spec, offset)
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits_TE, gates_TA, experts_TA = theirs(x_TD)
    routing: Routing = ours(x_TD)
    torch.testing.assert_close(routing.logits_TE, logits_TE, rtol=0, atol=0)
    assert torch.equal(routing.experts_TA.sort(1).values, experts_TA.sort(1).values)
    want_TE, got_TE = by_expert(experts_TA, gates_TA), by_expert(routing.experts_TA, routing.gates_TA)
    torch.testing.assert_close(got_TE, want_TE, rtol=1e-5, atol=1e-6)
    weigh_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    want = torch.autograd.grad((want_TE * weigh_TE).sum(), (x_TD, theirs.weight))
    got = torch.autograd.grad((got_TE * weigh_TE).sum(), (x_TD, ours.weight))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_switch_equals_theirs():
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    theirs = switch.SwitchTransformersTop1Router(config(
        "SwitchTransformersConfig", num_experts=EXPERTS, expert_capacity=TOKENS, d_model=WIDTH, router_bias=False
    )).eval()
    ours = Switch().build(WIDTH, EXPERTS).eval()
    ours.weight.data.copy_(theirs.classifier.weight.data)
    x_TD = torch.randn(TOKENS, WIDTH)
    found, routing = theirs(x_TD[None]), ours(x_TD)  # what they return has changed its order over versions
    chosen_TE = next(part[0] for part in found if not part.is_floating_point())
    prob_T1 = next(part[0] for part in found if part.is_floating_point() and part.shape[-1] == 1)
    torch.testing.assert_close(routing.logits_TE, theirs.classifier(x_TD), rtol=0, atol=0)
    assert torch.equal(routing.experts_TA[:, 0], chosen_TE.argmax(-1).flatten())
    torch.testing.assert_close(routing.gates_TA, prob_T1)


@pytest.mark.parametrize("p_norm", [1.0, 2.0, None])
def test_dbrx_equals_theirs(p_norm):
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    settings = {"moe_num_experts": EXPERTS, "moe_top_k": 4, "moe_normalize_expert_weights": p_norm}
    theirs = DbrxFFN(config("DbrxConfig", d_model=WIDTH, ffn_config={**settings, "ffn_hidden_size": 8}))
    spec = SoftmaxTopK(top_k=4) if p_norm is None else SoftmaxTopK(top_k=4, normalize=True, p_norm=p_norm)
    ours = spec.build(WIDTH, EXPERTS)
    ours.weight.data.copy_(theirs.router.layer.weight.data)
    x_TD = torch.randn(TOKENS, WIDTH)
    gates_TA, experts_TA = theirs.route_tokens_to_experts(theirs.router(x_TD))
    routing = ours(x_TD)
    assert torch.equal(routing.experts_TA, experts_TA)
    torch.testing.assert_close(routing.gates_TA, gates_TA)
