"""DSA: the index by its formula, the choice, an indexer that learns from attention. Ids of spec deepseek-v3, A."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, PLAIN, built, close, model_spec, random_tokens, run
from torch import Tensor

from sextant.axes.attention import DSA, Full, Selection
from sextant.axes.attention.dsa import best_tokens, head_mass, index_scores
from sextant.axes.kv import GQA, KV, MLA
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, attend_dense
from sextant.model.spec import Layer
from sextant.train.loss import Balance, micro_loss

LATENT = MLA(heads=4, rank=12, nope_dim=6, rope_dim=4, v_dim=5, q_rank=7)
TOKENS = DSA(top_k=4, heads=3, head_dim=6, rope_dim=4)
BLOCKS = DSA(top_k=3, heads=2, head_dim=5, block=3)
KVS = pytest.mark.parametrize("kv", [PLAIN, LATENT], ids=["gqa", "mla"])
PATTERNS = pytest.mark.parametrize("pattern", [TOKENS, BLOCKS], ids=["tokens", "blocks"])


def trained(pattern: DSA, kv: KV, layers: int = 2):
    """A copy in training mode."""
    return copy.deepcopy(built(pattern, kv, layers=layers)).train()


def selections(model, tokens_T: Tensor, lengths: list[int]) -> dict[int, Selection]:
    return model(tokens_T, Stream.of_lengths(lengths)).selections


@KVS
@pytest.mark.parametrize("block, top_k", [(1, 11), (1, 40), (3, 4), (11, 1)])
def test_dsa_1_a_budget_beyond_the_sequence_is_full_attention(kv, block, top_k):
    pattern = TOKENS.replace(block=block, top_k=top_k)
    sparse, full = built(pattern, kv, layers=2), copy.deepcopy(built(Full(), kv, layers=2))
    full.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".indexer." not in k})
    tokens_T = random_tokens(11)
    close(run(sparse, tokens_T, [11]), run(full, tokens_T, [11]))
    tokens_T = random_tokens(2 * block * top_k + 9)
    far = len(tokens_T)
    assert (run(sparse, tokens_T, [far]) - run(full, tokens_T, [far])).abs().max() > 1e-4


@KVS
@PATTERNS
def test_dsa_2_attention_reads_what_was_chosen(kv, pattern):
    """Recomputed from the recorded choice by a dense mask, for every head alike."""
    model, tokens_T, seen = built(pattern, kv, layers=1), random_tokens(19), {}
    attention = model.blocks[0].attention
    hook = attention.pattern.register_forward_hook(lambda _, args, out: seen.update(heads=args[0], out=out))
    run(model, tokens_T, [19])
    hook.remove()
    heads, (o_THV, selection) = seen["heads"], seen["out"]
    mask_TS = torch.zeros(19, 19, dtype=torch.bool)
    for t in range(19):
        for chosen in selection.blocks_THJ[t, 0].tolist():
            if chosen >= 0:
                mask_TS[t, chosen * pattern.block : min(t + 1, (chosen + 1) * pattern.block)] = True
    assert mask_TS.sum(1).cumsum(0).tolist() == [pattern._keys(t + 1) for t in range(19)]
    close(o_THV, attend_dense(heads.q_THK, heads.k_TGK, heads.v_TGV, mask_TS, attention.kv.scores)[0])


@KVS
@PATTERNS
def test_dsa_3_choices_are_causal_and_once_each(kv, pattern):
    model, lengths = built(pattern, kv), [13, 1, 8]
    for selection in selections(model, random_tokens(22), lengths).values():
        assert selection.blocks_THJ.shape[1] == 1 and selection.loss is None
        for rows_THJ in selection.blocks_THJ.split(lengths):
            for t, row in enumerate(rows_THJ[:, 0].tolist()):
                real = [number for number in row if number >= 0]
                assert len(set(real)) == len(real) == min(pattern.top_k, t // pattern.block + 1)
                assert max(real) <= t // pattern.block
                assert pattern.block == 1 or t // pattern.block in real


def test_index_by_its_formula():
    """Appendix A: half-split turns on the first channels, LayerNorm on the key, relu, weights, both factors."""
    model, x_TD = built(TOKENS, LATENT, layers=1), torch.randn(7, 10, dtype=torch.float64)
    indexer, stream = model.blocks[0].attention.pattern.indexer, Stream.of_lengths([7])
    heads = model.blocks[0].attention.kv.project(x_TD, stream)
    index = indexer(x_TD, heads, stream)
    got_TS = index_scores(index.q_THK, index.k_TGK[:, 0], index.weights_TH)
    weight = dict(indexer.named_parameters())

    def turned(x: Tensor, t: int) -> Tensor:
        angle = t * 10_000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        a, b = x[:2], x[2:4]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[4:]])

    q = (heads.q_latent_TR @ weight["q.weight"].T).unflatten(-1, (3, 6))
    k = x_TD @ weight["k.weight"].T
    k = F.layer_norm(k, (6,), weight["k_norm.gain"], weight["k_norm.bias"], 1e-6)
    for t in range(7):
        for s in range(7):
            dots = torch.stack([turned(q[t, h], t) @ turned(k[s], s) for h in range(3)]).relu() / 6**0.5
            close(got_TS[t, s], (x_TD[t] @ weight["weights.weight"].T / 3**0.5) @ dots, 1e-12)


def test_ties_go_to_the_lower_token():
    index_TS = torch.tensor([[9.0, 9, 9, 9], [0, 0, 0, 9], [1, 2, 2, 9], [0, 1, 1, 1]])
    assert best_tokens(index_TS, 0, 2).tolist() == [[0, -1], [0, 1], [1, 2], [1, 2]]
    assert best_tokens(index_TS[:1], 3, 3).tolist() == [[0, 1, 2]]


@KVS
@PATTERNS
@pytest.mark.parametrize("stage", ["sparse", "dense"])
def test_dsa_4_each_loss_teaches_its_own(kv, pattern, stage):
    """The index loss touches the indexer alone, the language loss never does."""
    model, tokens_T = trained(pattern.replace(stage=stage), kv), random_tokens(20)
    out = model(tokens_T, Stream.of_lengths([13, 7]))
    model.logits(out.hidden_TD).square().sum().backward(retain_graph=True)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and not any(".indexer." in name for name in moved)
    model.zero_grad(set_to_none=True)
    torch.stack([selection.loss for selection in out.selections.values()]).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name in moved)


@KVS
@pytest.mark.parametrize("stage", ["sparse", "dense"])
def test_the_loss_by_its_definition(kv, stage):
    """KL of the head-summed, L1-normalised probabilities and the index's softmax, row by row."""
    model, seen = trained(TOKENS.replace(stage=stage, loss_scale=2.0), kv, layers=1), {}
    attention = model.blocks[0].attention
    attention.pattern.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    selections(model, random_tokens(15), [15])
    heads, x_TD, stream, scores, _ = seen["args"]
    selection, index = seen["out"][1], attention.pattern.indexer(x_TD, heads, stream)
    index_TS = index_scores(index.q_THK, index.k_TGK[:, 0], index.weights_TH)
    k_THK = heads.k_TGK.repeat_interleave(4 // heads.k_TGK.shape[1], 1)
    want = 0.0
    for t in range(15):
        read = range(t + 1) if stage == "dense" else sorted(s for s in selection.blocks_THJ[t, 0].tolist() if s >= 0)
        read = list(read)
        p = sum(torch.softmax(k_THK[read, h] @ heads.q_THK[t, h] * scores.scale, 0) for h in range(4)) / 4
        want = want + (p * (p.log() - torch.log_softmax(index_TS[t, read], 0))).sum()
    close(selection.loss, 2.0 * want, 1e-10)


def test_the_loss_of_a_step_is_divided_by_its_tokens():
    model, tokens_T = trained(TOKENS, PLAIN), random_tokens(20)
    stream = Stream.of_lengths([13, 7])
    loss = micro_loss(model, tokens_T, tokens_T.roll(-1), stream, Balance(model.spec), 40, 40)
    want = sum(selection.loss for selection in selections(model, tokens_T, [13, 7]).values()) / 40
    close(loss.total - loss.nats / 40, want)
    pieces = [selections(model, piece, [len(piece)]) for piece in tokens_T.split([13, 7])]
    close(sum(one[layer].loss for one in pieces for layer in one) / 40, want)


def test_head_mass_adds_up_and_stays_inside_its_mask():
    q, k = torch.randn(300, 4, 5, dtype=torch.float64), torch.randn(300, 2, 5, dtype=torch.float64)
    mask = (torch.rand(300, 300) < 0.5).tril() | torch.eye(300, dtype=torch.bool)
    mass = head_mass(q, k, mask, Scores(0.4))
    close(mass.sum(1), torch.ones(300, dtype=torch.float64))
    assert not mass[~mask].any() and mass[mask].min() > 0


def test_dsa_5_warming_up_finds_where_attention_looks():
    """Recall of attention mass by the chosen tokens rises while only the indexer learns."""
    torch.manual_seed(0)
    pattern = DSA(top_k=6, heads=8, head_dim=8, rope_dim=4, stage="dense")
    layer = Layer(attention=pattern, kv=GQA(heads=2, kv_heads=2, head_dim=8), feed_forward=DENSE)
    model = model_spec(layer).build(seed=3).train()
    learning = [p for name, p in model.named_parameters() if ".indexer." in name]
    optimiser, recalls = torch.optim.Adam(learning, lr=1e-2), []
    attention, seen = model.blocks[0].attention, {}
    attention.pattern.register_forward_hook(lambda _, args, out: seen.update(args=args))
    for step in range(121):
        selection = selections(model, random_tokens(48, seed=step % 30), [48])[0]
        if step % 120 == 0:
            held_out = selections(model, random_tokens(48, seed=99), [48])[0]
            heads, scores, chosen_TJ = seen["args"][0], seen["args"][3], held_out.blocks_THJ[:, 0]
            causal = torch.ones(48, 48, dtype=torch.bool).tril()
            mass_TS = head_mass(heads.q_THK, heads.k_TGK, causal, scores)
            found = mass_TS.gather(1, chosen_TJ.clamp_min(0)).where(chosen_TJ >= 0, 0.0).sum(1)
            recalls.append(float(found[12:].mean()))
        optimiser.zero_grad()
        selection.loss.backward()
        optimiser.step()
    assert recalls[1] > recalls[0] + 0.15, recalls


def test_dsa_6_a_rotation_of_queries_and_keys_changes_nothing():
    """The released kernels turn both by a Hadamard matrix before rounding; exact products do not need it."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 8:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    hadamard = hadamard / 8**0.5
    q, k = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    weights = torch.randn(5, 3, dtype=torch.float64)
    close(index_scores(q @ hadamard, k @ hadamard, weights), index_scores(q, k, weights), 1e-12)


@KVS
def test_costs(kv):
    """A step reads all index keys and the chosen rows; the index is the part that grows with the length."""
    pattern, at = DSA(top_k=8, heads=2, head_dim=6), At(100, itemsize=2)
    cost, row = pattern.cost(10, kv, at), kv.row()
    assert cost.read_bytes == 2 * (100 * 6 + 8 * row.heads * (row.k_dim + row.v_dim))
    assert cost.state_bytes == 2 * 100 * (6 + row.heads * (row.k_dim + row.v_dim))
    heads, _, k_dim, v_dim = kv.shape
    keys = (sum(range(1, 9)) + 92 * 8) / 100
    projections = 2 * (kv.query_width(10) * 12 + 10 * (6 + 2))
    assert cost.flops == pytest.approx(projections + 2 * 2 * 7 * 50.5 + 2 * heads * (k_dim + v_dim) * keys)
    v3 = MLA(heads=128, rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_rank=1536)
    released = DSA(top_k=2048, heads=64, head_dim=128, rope_dim=64)
    longer, shorter = (released.cost(7168, v3, At(n)).flops for n in (2**20, 2**19))
    assert (longer - shorter) / 2**18 == pytest.approx(16_512, rel=1e-2)  # 16.5 kFLOP per pair, spec appendix A


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_dim": 3}, "rope_dim 3 must be even"),
        ({"rope_dim": 8}, "rope_dim 8 must be even and at most head_dim 6"),
        ({"stage": "warm"}, "stage"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_impossible_indexers_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        DSA.parse({**TOKENS.to_dict(), **fields})
