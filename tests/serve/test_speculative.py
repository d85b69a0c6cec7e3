"""Drafts change how fast tokens come, never which (spec deepseek-v3, MTP-5)."""

import itertools

import pytest
import torch
from cases import DENSE, MOE, model_spec, random_tokens
from torch import Tensor

from sextant.axes.attention import Window
from sextant.axes.kv import GQA, MLA
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.model.mtp import MTP
from sextant.model.spec import Layer
from sextant.model.transformer import Transformer
from sextant.serve.generate import decode_tokens
from sextant.serve.sampling import Sampling, transformed
from sextant.serve.speculative import speculate

HEADS = GQA(heads=2, kv_heads=1, head_dim=6)
LATENT = MLA(heads=2, rank=4, nope_dim=4, rope_dim=2, v_dim=4)
PLAIN = Layer(kv=HEADS, feed_forward=DENSE)


def build(*layers: Layer, mtp: MTP = MTP(), **fields: object) -> Transformer:  # noqa: B008 - frozen
    return model_spec(*layers, mtp=mtp, **fields).build(seed=1).double().eval()


@pytest.mark.parametrize(
    "layers",
    [
        (PLAIN, PLAIN), (Layer(kv=LATENT, feed_forward=MOE),),
        (PLAIN, Layer(attention=Window(window=3), kv=HEADS, feed_forward=MOE)),
    ],
    ids=["full", "latent-experts", "window-experts"],
)
@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
def test_greedy_tokens_are_those_without_drafts(layers, hidden):
    """Prompts of many lengths; sequences end at different steps, because drafts are right at different ones."""
    model = build(*layers, mtp=MTP(hidden=hidden), vocab=5)
    prompts = [random_tokens(n, seed=n, vocab=5).tolist() for n in (1, 7, 2, 4)]
    answers = speculate(model, prompts, 25)
    assert [answer.tokens for answer in answers] == decode_tokens(model, prompts, 25)
    kept, drafts = sum(answer.kept for answer in answers), sum(answer.drafts for answer in answers)
    assert 0 < kept < drafts


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
def test_drafts_are_those_of_a_module_that_reads_the_finished_text(hidden):
    """Nothing refused stays in its state: as many drafts are right as one forward over the text says."""
    model, new = build(PLAIN, PLAIN, mtp=MTP(hidden=hidden), vocab=5), 30
    with torch.no_grad():
        model.norm.gain.mul_(torch.linspace(0.2, 2.0, model.spec.width))
    prompts = [random_tokens(n, seed=n, vocab=5).tolist() for n in (1, 7, 4)]
    for prompt, answer in zip(prompts, speculate(model, prompts, new), strict=True):
        text_T = torch.tensor([*prompt, *answer.tokens])
        rows_TD = model(text_T, Stream.of_lengths([len(text_T)]), ahead=True).ahead[0].out.hidden_TD
        right = (model.logits(rows_TD).argmax(-1)[:-1] == text_T[2:]).tolist()
        found, at = [], len(prompt) - 1
        while at < len(prompt) + new - 2:
            found.append(right[at])
            at += 1 + right[at]
        assert (answer.kept, answer.drafts) == (sum(found), len(found))


@pytest.mark.parametrize("new", [1, 2, 3])
def test_as_many_tokens_as_asked_for(new):
    model, prompts = build(PLAIN), [[3], [1, 2]]
    assert [answer.tokens for answer in speculate(model, prompts, new)] == decode_tokens(model, prompts, new)


def test_neighbours_change_no_draw():
    model, sampling = build(PLAIN, vocab=6), Sampling(seed=3)
    prompts = [[1], [2, 3], [5, 4, 4]]
    together = speculate(model, prompts, 9, sampling)
    assert speculate(model, prompts[:1], 9, sampling) == together[:1]
    assert together == speculate(model, prompts, 9, sampling) != speculate(model, prompts, 9, Sampling(seed=4))


SAMPLINGS = [Sampling(), Sampling(temperature=0.6, top_k=3), Sampling(temperature=1.5, top_p=0.8)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top-k", "top-p"])
def test_sampled_tokens_are_distributed_as_the_model_says(sampling):
    """Chi-square over every text of three tokens from a vocabulary of four, 4,000 draws; the bound is p = 0.001."""
    vocab, new, draws, prompt = 4, 3, 4000, [2, 0]
    model = build(PLAIN, vocab=vocab)
    texts = list(itertools.product(range(vocab), repeat=new))
    expected = draws * probabilities(model, prompt, texts, sampling)
    answers = speculate(model, [prompt] * draws, new, sampling.replace(seed=11))
    found = torch.zeros(len(texts), dtype=torch.float64)
    for answer in answers:
        found[texts.index(tuple(answer.tokens))] += 1
    assert found[expected == 0].sum() == 0
    often = expected >= 5
    observed, wanted = (torch.cat([x[often], x[~often].sum()[None]]) for x in (found, expected))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    chi_square = ((observed - wanted) ** 2 / wanted).sum().item()
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 6  # Wilson-Hilferty, rounded up
    kept = sum(answer.kept for answer in answers) / sum(answer.drafts for answer in answers)
    assert 0.2 < kept < 0.97  # both branches of the rule were taken


@torch.no_grad()
def probabilities(model: Transformer, prompt: list[int], texts: list[tuple[int, ...]], sampling: Sampling) -> Tensor:
    """Of each text after the prompt, by one forward over all of them."""
    rows_BT = torch.tensor([[*prompt, *text] for text in texts])
    logits_BTP = model.batch_logits(rows_BT)[:, len(prompt) - 1 : -1]
    log_BTP = transformed(logits_BTP.flatten(0, 1), [sampling] * logits_BTP[..., 0].numel()).double().log_softmax(-1)
    log_BTP = log_BTP.view(logits_BTP.shape)
    return log_BTP.gather(2, rows_BT[:, len(prompt) :, None]).sum((1, 2)).exp()


def test_a_model_without_modules_is_refused():
    with pytest.raises(UsageError, match=r"model\.mtp"):
        speculate(build(PLAIN, mtp=None), [[1]], 2)
