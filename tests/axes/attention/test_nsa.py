"""NSA against loops written from its equations in fp64; the property tests of spec sparse-attention 15."""

import math

import pytest
import torch
from cases import close, model_spec, params, random_tokens
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sextant.axes.attention import NSA, MeanPhi, MLPPhi
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.numerics import BF16, FP32
from sextant.axes.stability import RMSNorm
from sextant.core.cost import At
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.kernels.attention import compressed
from sextant.kernels.attention.compressed import Grid
from sextant.model.block import SelfAttention
from sextant.model.spec import Layer

WIDTH, T = 12, 25
SMALL = NSA(length=4, stride=2, block=4, top_k=4, window=5, phi=MLPPhi(hidden=6))
KV = GQA(heads=6, kv_heads=2, head_dim=4, v_head_dim=3)
CASES = params(
    [
        (SMALL, KV),
        (SMALL.replace(gates="token", top_k=3), GQA(heads=3, kv_heads=3, head_dim=4, position=RoPE(fraction=0.5))),
        (SMALL.replace(length=6, block=8, initial=0, local=1, top_k=2), KV.replace(qk_norm=RMSNorm(), bias=True)),
        (SMALL.replace(length=2, block=2, top_k=5), GQA(heads=5, kv_heads=1, head_dim=6, scale=0.7)),
        (SMALL.replace(cmp_rope="none", local=3), KV.replace(position=RoPE(layout="interleaved"))),
        (SMALL.replace(cmp_rope="none", separate_kv=False), KV.replace(position=NoPE())),
        (SMALL.replace(separate_kv=False), KV.replace(qk_norm=RMSNorm())),
        (SMALL.replace(cmp_rope="post", phi=MeanPhi(), separate_kv=False), KV),
        (SMALL.replace(cmp_rope="post", phi=MeanPhi()), KV),
    ]
)


def layer(spec: NSA, kv: GQA, numerics=FP32()) -> SelfAttention:  # noqa: B008 - frozen
    """A whole attention step in fp64, every weight random."""
    module = SelfAttention(spec, kv, WIDTH, numerics, 0).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def attended(module: SelfAttention, x_TD: Tensor, stream: Stream, state=None):
    heads = module.kv.project(x_TD, stream, True)
    return module.pattern(heads, x_TD, stream, module.kv.scores, state)


def turned(x_TGK: Tensor, position_T: Tensor, kv: GQA) -> Tensor:
    """Rotation by complex numbers."""
    if not isinstance(kv.position, RoPE):
        return x_TGK
    dim = int(kv.head_dim * kv.position.fraction)
    angle = position_T[:, None].double() * kv.position.base ** (-torch.arange(0, dim, 2).double() / dim)
    turning = x_TGK[..., :dim]
    if kv.position.layout == "interleaved":
        pairs = torch.view_as_complex(turning.unflatten(-1, (-1, 2)).contiguous())
    else:
        pairs = torch.complex(*turning.chunk(2, -1))
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    back = torch.view_as_real(pairs)
    flat = back.flatten(-2) if kv.position.layout == "interleaved" else torch.cat(back.unbind(-1), -1)
    return torch.cat([flat, x_TGK[..., dim:]], -1)


class Oracle:
    """NSA of one sequence by loops over queries, heads, windows and blocks (2502.11089, section 3)."""

    def __init__(self, spec: NSA, kv: GQA, module: SelfAttention, x_TD: Tensor):
        self.spec, self.kv, self.module, self.x, self.tokens = spec, kv, module, x_TD, len(x_TD)
        self.place = torch.arange(self.tokens)
        own, pattern = module.kv, module.pattern
        self.q_plain = self.rows(own.q, kv.head_dim, own.q_norm)
        self.q = turned(self.q_plain, self.place, kv)
        first = (self.rows(own.k, kv.head_dim, own.k_norm), self.rows(own.v, kv.shape[3]))
        coarse, near = (
            (self.rows(b.k, kv.head_dim, b.norm if kv.qk_norm else None), self.rows(b.v, kv.shape[3]))
            if spec.separate_kv else first
            for b in (pattern.coarse, pattern.near)
        )
        self.k_coarse, self.v_coarse = self.compress(*coarse)
        self.selected = turned(first[0], self.place, kv), first[1]
        self.near = turned(near[0], self.place, kv), near[1]

    def rows(self, linear, dim, norm=None) -> Tensor:
        y = (self.x @ linear.weight.T + (0 if linear.bias is None else linear.bias)).unflatten(-1, (-1, dim))
        return y if norm is None else norm.gain * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def compress(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        spec, pattern = self.spec, self.module.pattern
        if spec.cmp_rope == "post":
            k = turned(k, self.place, self.kv)
        starts = [s for s in range(0, self.tokens, spec.stride) if s + spec.length <= self.tokens]
        keys = [self.phi(pattern.phi_k, k[s : s + spec.length]) for s in starts]
        if spec.cmp_rope == "strided":
            keys = [turned(key[None], torch.tensor([s]), self.kv)[0] for key, s in zip(keys, starts, strict=True)]
        return keys, [self.phi(pattern.phi_v, v[s : s + spec.length]) for s in starts]

    def phi(self, module, rows: Tensor) -> Tensor:
        if isinstance(self.spec.phi, MeanPhi):
            return sum(rows) / self.spec.length
        out = []
        for g in range(rows.shape[1]):
            flat = torch.cat([row[g] + place[g] for row, place in zip(rows, module.place_WGK, strict=True)])
            hidden = flat @ module.up_GDF[g]
            out.append((hidden * torch.sigmoid(hidden)) @ module.down_GFK[g])
        return torch.stack(out)

    def softmax_over(self, q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not pairs:
            return torch.zeros(self.kv.shape[3], dtype=q.dtype), torch.zeros(0, dtype=q.dtype)
        scale = self.kv.scale or self.kv.head_dim**-0.5
        weights = torch.stack([q @ k * scale for k, _ in pairs]).softmax(0)
        return sum(w * v for w, (_, v) in zip(weights, pairs, strict=True)), weights

    def coarse(self, t: int, h: int) -> tuple[Tensor, list[float]]:
        """Output, and the score of every block that has begun: weights by the share of tokens (T13)."""
        spec, g = self.spec, h // (self.kv.heads // self.kv.kv_heads)
        seen = [i for i in range(len(self.k_coarse)) if i * spec.stride + spec.length - 1 <= t]
        q = (self.q_plain if spec.cmp_rope == "none" else self.q)[t, h]
        o, weights = self.softmax_over(q, [(self.k_coarse[i][g], self.v_coarse[i][g]) for i in seen])
        scores = []
        for j in range(t // spec.block + 1):
            block = set(range(j * spec.block, (j + 1) * spec.block))
            shares = [len(block & set(range(i * spec.stride, i * spec.stride + spec.length))) for i in seen]
            scores.append(sum(w.item() * n / spec.stride for w, n in zip(weights, shares, strict=True)))
        return o, scores

    def choice(self, t: int, g: int, scores: list[list[float]]) -> set[int]:
        spec, current = self.spec, t // self.spec.block
        forced = {j for j in range(current + 1) if j < spec.initial or j > current - spec.local}
        total = [sum(column) for column in zip(*scores, strict=True)]
        rest = sorted((j for j in range(current) if j not in forced), key=lambda j: (-total[j], j))
        return forced | set(rest[: spec.top_k - len(forced)])

    def run(self) -> tuple[Tensor, list[list[set[int]]]]:
        heads, per_group = self.kv.heads, self.kv.heads // self.kv.kv_heads
        gates = torch.sigmoid(self.x @ self.module.pattern.gate.weight.T).unflatten(-1, (3, -1))
        outputs, chosen = [], []
        for t in range(self.tokens):
            looks = [self.coarse(t, h) for h in range(heads)]
            groups = [looks[g * per_group : (g + 1) * per_group] for g in range(self.kv.kv_heads)]
            chosen.append([self.choice(t, g, [s for _, s in look]) for g, look in enumerate(groups)])
            row = []
            for h in range(heads):
                g = h // per_group
                read = [s for s in range(t + 1) if s // self.spec.block in chosen[t][g]]
                near = range(max(0, t - self.spec.window + 1), t + 1)
                parts = [looks[h][0]]
                for (k, v), places in ((self.selected, read), (self.near, near)):
                    parts.append(self.softmax_over(self.q[t, h], [(k[s, g], v[s, g]) for s in places])[0])
                gate = gates[t, :, h if self.spec.gates == "head" else 0]
                row.append(sum(gate[i] * part for i, part in enumerate(parts)))
            outputs.append(torch.stack(row))
        return torch.stack(outputs), chosen


def sets(blocks_TGJ: Tensor) -> list[list[set[int]]]:
    return [[{j for j in places if j >= 0} for places in row] for row in blocks_TGJ.tolist()]


@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_equals_loops_over_the_equations(spec, kv):
    """Outputs, choices, and the gradients of x and of every parameter (T2)."""
    module, x_TD = layer(spec, kv), torch.randn(T, WIDTH, dtype=torch.float64, requires_grad=True)
    got, selection = attended(module, x_TD, Stream.of_lengths([T]))
    want, chosen = Oracle(spec, kv, module, x_TD).run()
    close(got, want)
    assert sets(selection.blocks_THJ) == chosen
    assert (selection.blocks_THJ.shape, selection.block) == ((T, kv.kv_heads, spec.top_k), spec.block)
    weight = torch.randn_like(got)
    parameters = {name: p for name, p in module.named_parameters() if ".o." not in f".{name}"}
    ours = torch.autograd.grad((got * weight).sum(), [x_TD, *parameters.values()])
    theirs = torch.autograd.grad((want * weight).sum(), [x_TD, *parameters.values()])
    for name, g, w in zip(["x", *parameters], ours, theirs, strict=True):
        close(g, w, 1e-10)
        assert g.abs().max() > 1e-6, name


@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_pieces_of_queries_change_nothing(spec, kv, monkeypatch):
    """Scores that do not fit at once: recomputed in backward, the same numbers."""
    module, x_TD = layer(spec, kv), torch.randn(T, WIDTH, dtype=torch.float64)
    results = []
    for size in (2**26, 4 * kv.heads * 11 * 3):
        monkeypatch.setattr(compressed, "PIECE_BYTES", size)
        module.zero_grad()
        o_THV, selection = attended(module, x_TD, Stream.of_lengths([T]))
        o_THV.square().sum().backward()
        gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        results.append([o_THV.detach(), *gradients, selection.blocks_THJ.double()])
    for whole, pieces in zip(*results, strict=True):
        close(pieces, whole, 1e-10)


def test_scores_never_exceed_a_piece(monkeypatch):
    """No ``[G, T, N, S]`` of more than the limit, where all at once would be forty times as much."""
    sizes, made = [], compressed.window_weights

    def watched(*args):
        weights = made(*args)
        sizes.append(weights.numel() * 4)
        return weights

    monkeypatch.setattr(compressed, "window_weights", watched)
    monkeypatch.setattr(compressed, "PIECE_BYTES", 2**14)
    spec, kv = SMALL.replace(cmp_rope="none"), KV
    module = layer(spec, kv)
    attended(module, torch.randn(333, WIDTH, dtype=torch.float64), Stream.of_lengths([333]))[0].sum().backward()
    assert max(sizes) <= 2**14 and 4 * 6 * 333 * 165 > 40 * 2**14
    assert sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :][::-1]  # made again in backward, not kept
    assert sum(sizes) < 2 * 0.6 * 4 * 6 * 333 * 165  # only for windows that have begun


GRIDS = [(32, 16, 64), (16, 16, 64), (8, 4, 16), (16, 16, 16), (12, 4, 20)]


@pytest.mark.parametrize(("length", "stride", "block"), GRIDS)
def test_importance_is_the_overlap_in_tokens(length, stride, block):
    """T13, exactly: a window counts for a block by the tokens they share, in units of the stride."""
    grid, tokens = Grid(length, stride, block), 5 * block + stride + 1
    windows = grid.complete(tokens)
    one_hot_TGS = torch.eye(windows, dtype=torch.float64)[:, None]
    got_TM = grid.importance(one_hot_TGS, tokens)[:, 0]
    for i in range(windows):
        mine = set(range(i * stride, i * stride + length))
        for j in range(got_TM.shape[1]):
            assert got_TM[i, j] == len(mine & set(range(j * block, (j + 1) * block))) / stride
    assert got_TM.shape == (windows, -(-tokens // block))


def test_the_papers_weights():
    """1-2-2-2-1 over the windows 4 j - 1 to 4 j + 3; one window per block where all lengths are equal."""
    assert Grid(32, 16, 64).overlaps() == [1, 2, 2, 2, 1]
    assert Grid(16, 16, 16).overlaps() == [1]


def with_gates(module: SelfAttention, *gates: float) -> SelfAttention:
    """Gates that do not look at x."""
    copies = len(module.pattern.gate.weight) // 3
    logits = torch.logit(torch.tensor(gates, dtype=torch.float64)).repeat_interleave(copies)
    module.pattern.gate.forward = lambda x_TD: logits.expand(len(x_TD), -1)
    return module


def causal(module: SelfAttention, x_TD: Tensor) -> Tensor:
    heads = module.kv.project(x_TD, Stream.of_lengths([len(x_TD)]))
    q, k, v = (x.transpose(0, 1) for x in (heads.q_THK, heads.k_TGK, heads.v_TGV))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=module.kv.scores.scale, enable_gqa=True
    ).transpose(0, 1)


def test_selecting_all_blocks_is_full_attention():
    """T1: the selection branch alone, every block chosen; with few blocks it is something else (T10)."""
    x_TD = torch.randn(T, WIDTH, dtype=torch.float64)
    for top_k, same in ((7, True), (3, False)):
        module = with_gates(layer(SMALL.replace(top_k=top_k), KV), 0.0, 1.0, 0.0)
        got = attended(module, x_TD, Stream.of_lengths([T]))[0]
        assert torch.allclose(got, causal(module, x_TD), rtol=1e-10, atol=1e-10) is same


def test_a_window_over_everything_is_full_attention():
    module = with_gates(layer(SMALL.replace(window=T, separate_kv=False), KV), 0.0, 0.0, 1.0)
    x_TD = torch.randn(T, WIDTH, dtype=torch.float64)
    close(attended(module, x_TD, Stream.of_lengths([T]))[0], causal(module, x_TD), 1e-10)


def test_no_complete_window_leaves_the_other_branches():
    """``o_cmp`` is 0 until token ``length - 1``, and from there it is not."""
    module = with_gates(layer(SMALL, KV), 1.0, 0.0, 0.0)
    o_THV = attended(module, torch.randn(9, WIDTH, dtype=torch.float64), Stream.of_lengths([9]))[0]
    assert (o_THV[:3] == 0).all() and (o_THV[3:].abs().amax((1, 2)) > 1e-3).all()


def test_what_is_not_chosen_has_no_gradient():
    """T10: with only the selection branch open, values of blocks that no query chose get exactly 0."""
    module = with_gates(layer(SMALL.replace(top_k=2, initial=0, local=1), KV), 0.0, 1.0, 0.0)
    x_TD, stream = torch.randn(T, WIDTH, dtype=torch.float64), Stream.of_lengths([T])
    heads = module.kv.project(x_TD, stream)
    heads.v_TGV.retain_grad()
    o_THV, selection = module.pattern(heads, x_TD, stream, module.kv.scores, None)
    o_THV[-1].sum().backward()
    read = sets(selection.blocks_THJ)[-1]
    for s in range(T):
        for g in range(KV.kv_heads):
            assert (heads.v_TGV.grad[s, g] != 0).any() == (s // SMALL.block in read[g])


def test_heads_permuted_together_permute_the_output():
    """T14, with T12: query heads of a group share its choice, so swapping groups swaps outputs and choices."""
    kv = GQA(heads=4, kv_heads=2, head_dim=4)
    module = layer(SMALL.replace(separate_kv=False, phi=MeanPhi(), cmp_rope="post", gates="token"), kv)
    x_TD = torch.randn(T, WIDTH, dtype=torch.float64)
    before, choice = attended(module, x_TD, Stream.of_lengths([T]))
    with torch.no_grad():
        for linear in (module.kv.q, module.kv.k, module.kv.v):
            linear.weight.copy_(linear.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
    after, turned_choice = attended(module, x_TD, Stream.of_lengths([T]))
    close(after, before.unflatten(1, (2, 2)).flip(1).flatten(1, 2))
    assert torch.equal(turned_choice.blocks_THJ, choice.blocks_THJ.flip(1))


def test_token_changes_nothing_before_it_not_one_bit():
    """T3 and T4, every row after it changed by a factor of 5."""
    module, x_TD = layer(SMALL, KV), torch.randn(T, WIDTH, dtype=torch.float64)
    before, choice = attended(module, x_TD, Stream.of_lengths([T]))
    for t in (3, 4, 11, 23):
        other = torch.cat([x_TD[: t + 1], 5 * x_TD[t + 1 :]])
        after, other_choice = attended(module, other, Stream.of_lengths([T]))
        assert torch.equal(after[: t + 1], before[: t + 1])
        assert torch.equal(other_choice.blocks_THJ[: t + 1], choice.blocks_THJ[: t + 1])
        prefix, _ = attended(module, x_TD[: t + 1], Stream.of_lengths([t + 1]))
        close(prefix[-1], before[t], 1e-12)


@pytest.mark.parametrize("kind", ["equal keys", "huge keys", "one sink", "zero"])
def test_ties_and_extremes(kind):
    """T24: no NaN, the same choice twice, and under a tie the lowest blocks."""
    module, x_TD = layer(SMALL, KV), torch.randn(T, WIDTH, dtype=torch.float64)
    if kind == "equal keys":
        x_TD = x_TD[:1].expand(T, -1).contiguous()
    elif kind == "zero":
        x_TD = torch.zeros(T, WIDTH, dtype=torch.float64)
    elif kind == "one sink":
        x_TD[0] *= 1e4
    else:
        x_TD *= 1e6
    x_TD.requires_grad_()
    runs = [attended(module, x_TD, Stream.of_lengths([T])) for _ in range(2)]
    assert torch.equal(runs[0][1].blocks_THJ, runs[1][1].blocks_THJ)
    assert runs[0][0].isfinite().all()
    assert torch.autograd.grad(runs[0][0].sum(), x_TD)[0].isfinite().all()
    if kind == "zero":  # every complete window weighs alike: block 1 is the lowest with all of its windows behind it
        assert sets(runs[0][1].blocks_THJ)[-1] == [{0, 1, 5, 6}] * 2


def remembered(spec: NSA, kv: GQA, sizes: list[int], x_TD: Tensor, module: SelfAttention, undo: int = 0):
    memory, pieces, at = Memory([spec.state(kv)], 1, x_TD.dtype, undo=undo), [], 0
    for size in sizes:
        stream = Stream.of_lengths([size], memory=memory)
        pieces.append(attended(module, x_TD[at : at + size], stream, memory.layers[0])[0])
        memory.commit(stream)
        at += size
    return torch.cat(pieces), memory


@torch.no_grad()
@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_decoding_equals_training(spec, kv):
    """T5 and T11: chunks and single tokens; compressed rows are made once and never again."""
    module, x_TD = layer(spec, kv), torch.randn(T, WIDTH, dtype=torch.float64)
    want = attended(module, x_TD, Stream.of_lengths([T]))[0]
    made, phi = [], module.pattern.phi_k.forward
    module.pattern.phi_k.forward = lambda windows: made.append(len(windows)) or phi(windows)
    for sizes in ([1] * T, [7, 1, 1, 9, 7], [2, 23]):
        made.clear()
        got, memory = remembered(spec, kv, sizes, x_TD, module)
        close(got, want)
        assert sum(made) == spec.grid.complete(T)
        assert memory.nbytes == spec.state(kv).nbytes(T, 8)


@torch.no_grad()
def test_compressed_rows_are_bitwise_immutable():
    module, x_TD = layer(SMALL, KV), torch.randn(T, WIDTH, dtype=torch.float64)
    _, memory = remembered(SMALL, KV, [1] * 12, x_TD, module)
    before = [memory.layers[0].parts[name].buffer[0, :5].clone() for name in ("compressed_k", "compressed_v")]
    stream = Stream.of_lengths([T - 12], memory=memory)
    attended(module, x_TD[12:], stream, memory.layers[0])
    after = [memory.layers[0].parts[name].buffer[0, :5] for name in ("compressed_k", "compressed_v")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_state_is_what_the_paper_keeps():
    """Per token and KV head, K + V for the selection branch and (K + V) / d compressed; w and l rows beside."""
    kv, spec = GQA(heads=8, kv_heads=2, head_dim=192, v_head_dim=128), NSA(phi=MLPPhi(hidden=8))
    tokens = 65_536
    rows = tokens + spec.grid.complete(tokens) + spec.window + spec.length
    assert spec.state(kv).nbytes(tokens, 2) == 2 * rows * (192 + 128) * 2
    assert spec.grid.complete(tokens) == tokens // 16 - 1


@pytest.mark.parametrize(("context", "published"), [(8192, 2048), (16_384, 2560), (32_768, 3584), (65_536, 5632)])
def test_reads_are_the_published_ones(context, published):
    """2502.11089, table 4: tokens read by a decoding step, within the fragments of a block and a window."""
    kv = GQA(heads=16, kv_heads=1, head_dim=192, v_head_dim=128)
    rows = NSA(phi=MLPPhi(hidden=8)).cost(64, kv, At(context + 1, 2)).read_bytes / (2 * (192 + 128))
    assert published - 64 <= rows <= published


@torch.no_grad()
@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_read_bytes_are_what_a_step_reads(spec, kv):
    """Rows that reach a product in the step: compressed, chosen, near, and those compressed in it."""
    module, x_TD = layer(spec, kv), torch.randn(T, WIDTH, dtype=torch.float64)
    for tokens in (1, 4, 9, 12, 18, T):
        memory = remembered(spec, kv, [tokens - 1], x_TD, module)[1]
        stream = Stream.of_lengths([1], memory=memory)
        _, selection = attended(module, x_TD[tokens - 1 : tokens], stream, memory.layers[0])
        per_group = [sum(s // spec.block in chosen for s in range(tokens)) for chosen in sets(selection.blocks_THJ)[0]]
        complete = spec.grid.complete(tokens)
        fresh = (complete - spec.grid.complete(tokens - 1)) * spec.length
        rows = sum(per_group) + kv.kv_heads * (complete + min(tokens, spec.window) + fresh)
        assert spec.cost(WIDTH, kv, At(tokens, 8)).read_bytes == rows * (kv.head_dim + kv.shape[3]) * 8


@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_flops_by_counter_and_by_masks(spec, kv):
    """Products of phi, gates and branches by a counter; scores by the keys that each query reads."""
    module, x_TD = layer(spec, kv), torch.randn(T, WIDTH, dtype=torch.float64)
    heads, groups, k_dim, v_dim = kv.shape
    pattern, windows = module.pattern, spec.grid.complete(T)
    with FlopCounterMode(display=False) as counter:
        pattern.gate(x_TD)
        for branch in filter(None, (pattern.coarse, pattern.near)):
            branch(x_TD)
        for phi, dim in ((pattern.phi_k, k_dim), (pattern.phi_v, v_dim)):
            phi(torch.randn(windows, spec.length, groups, dim, dtype=torch.float64))
    chosen = sets(attended(module, x_TD, Stream.of_lengths([T]))[1].blocks_THJ)
    keys = sum(s // spec.block in chosen[t][0] for t in range(T) for s in range(t + 1))
    keys += sum(max(0, (t + 1 - spec.length) // spec.stride + 1) + min(t + 1, spec.window) for t in range(T))
    want = counter.get_total_flops() + 2 * heads * (k_dim + v_dim) * keys
    assert spec.cost(WIDTH, kv, At(T)).flops * T == pytest.approx(want)


def test_bf16_keeps_scores_and_gates_in_fp32():
    """Under the bf16 policy the choice is that of fp32 scores, and the output is off by rounding only."""
    spec, kv = SMALL.replace(top_k=7), KV
    module = layer(spec, kv).float()
    x_TD, stream = torch.randn(T, WIDTH), Stream.of_lengths([T])
    want, _ = attended(module, x_TD, stream)
    low = layer(spec, kv, BF16()).float()
    low.load_state_dict(module.state_dict())
    got, _ = attended(low, x_TD, stream)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).square().mean().sqrt() < 0.03 * want.square().mean().sqrt()


REFUSED = {
    "length is no multiple of stride": ({"length": 5}, "length 5 must be a multiple of stride 2"),
    "block is no multiple of stride": ({"block": 5}, "block 5 must be a multiple of stride 2"),
    "window longer than a block": ({"length": 6}, "length 6 exceeds block 4"),
    "too many forced": ({"local": 4}, "initial 1 and local 4 exceed top_k 4"),
    "turned keys through an MLP": ({"cmp_rope": "post"}, "cmp_rope post needs phi mean"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    fields, words = REFUSED[case]
    with pytest.raises(ValidationError, match=words):
        NSA.model_validate({**SMALL.model_dump(), **fields})


def test_every_parameter_learns_through_a_model():
    """A step of a whole model: phi, gates and all projections get a gradient, in float32 and with recomputation."""
    model = model_spec(Layer(attention=SMALL, kv=KV, feed_forward=Dense(hidden=8)), width=WIDTH).build(seed=1)
    tokens_T, stream = random_tokens(40), Stream.of_lengths([21, 19])
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model.logits(model(tokens_T, stream).hidden_TD).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if ".attention." in name})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        close(found[1][name], gradient, 1e-5)
    assert math.prod(found[0]["blocks.0.attention.pattern.phi_k.up_GDF"].shape) == 2 * 4 * 4 * 6
