"""T17: gates distilled on a frozen model. Their loss falls, they find the blocks that matter on held-out text better
than block means do, and not one bit of the model moves.
"""

import json
from itertools import pairwise

import pytest
import torch
from test_loop import corpus, trained  # noqa: F401 - fixtures

from sextant import recipes
from sextant.axes.attention import Seer, SeerR
from sextant.axes.attention.base import Sequence
from sextant.axes.attention.rows import Rows
from sextant.axes.attention.seer import Budget
from sextant.data.loader import heldout
from sextant.kernels.attention.topk import block_means, choose
from sextant.kernels.attention.truth import block_truth
from sextant.train.run import Run

BLOCK, TAKEN, LENGTH = 4, 4, 96
GATES = {
    "prompts": Seer(block=BLOCK, rule=Budget(tokens=BLOCK * (TAKEN + 1)), loss_scale=10.0),
    "decoding": SeerR(block=BLOCK, width=16, rule=Budget(tokens=BLOCK * (TAKEN + 1)), loss_scale=10.0),
}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> tuple[Run, object]:  # noqa: F811
    """A dense model trained for a moment."""
    run = recipes.get("llama-3-8b").twin()
    run = run.override(
        "model.vocab=300", "model.width=32", f"model.context={LENGTH}", f"data.seq_len={LENGTH}", "data.vocab=300",
        "model.layers[*].kv.head_dim=16", "model.layers[*].kv.heads=2", "model.layers[*].kv.kv_heads=1",
        "model.layers[*].feed_forward.hidden=64", "steps=60", "batch.rows=8", "batch.micro_rows=8",
        "eval_every=1000", "sample_every=1000", "save_every=1000",
    ).replace(name="base")
    run = run.replace(
        data=run.data.replace(source=str(corpus)), model=run.model.replace(layers=run.model.layers[:2]),
    )
    path = tmp_path_factory.mktemp("base")
    return run, trained(run, path), path


def distilled(base, gate, path):
    """A run of the gates alone, on the frozen model."""
    run, _, source = base
    layers = tuple(layer.replace(attention=gate) for layer in run.model.layers)
    return trained(
        run.replace(
            name="gates", model=run.model.replace(layers=layers), init_from=str(source), steps=60,
            train_only="*.pattern.gate.*", optimiser=run.optimiser.replace(lr=1e-2),
        ),
        path,
    )


class Look:
    """What a layer's pattern was given, kept while the hook is there."""

    def __init__(self, layer):
        self.handle = layer.attention.pattern.register_forward_pre_hook(self.keep)

    def keep(self, module, args):
        self.heads, _, self.stream, self.scores, _ = args


def found(spec, look: Look, here: slice, choice_THJ: torch.Tensor) -> tuple[float, float, int]:
    """Of one sequence: shares of the best past blocks, by the gate's own truth, that gate and pooled means find."""
    q, k = look.heads.q_THK[here], look.heads.k_TGK[here]
    whole, choosers = len(q) // BLOCK, choice_THJ.shape[1]
    rows = Rows.of(Sequence(0, here, q, k, k), spec.rows, BLOCK)
    truth_THM = block_truth(q, k, BLOCK, look.scores).unflatten(1, (choosers, -1)).amax(2)[..., :whole]
    liked_THM = torch.einsum("thk,mgk->thm", rows.mean(q)[rows.row_T], block_means(k, BLOCK, 0, whole))
    best, means = (
        choose(scores_THM, 0, BLOCK, TAKEN + 1)
        for scores_THM in (rows.largest(truth_THM)[rows.row_T], liked_THM.unflatten(1, (choosers, -1)).sum(2))
    )
    enough = torch.arange(len(q)) // BLOCK > 2 * TAKEN
    hits = []
    for picked_THJ in (choice_THJ, means):
        hit_THJ = (picked_THJ[enough][..., 1 : TAKEN + 1, None] == best[enough][..., None, 1:]).any(-1)
        hits.append(float(hit_THJ.double().mean((1, 2)).sum()))
    return hits[0], hits[1], int(enough.sum())


@torch.no_grad()
def recalls(trainer) -> tuple[float, float]:
    """Share of the ``TAKEN`` past blocks with the largest weights that gate and means find, on held-out text."""
    model, sums = trainer.model.eval(), torch.zeros(3)
    looks = [Look(layer) for layer in model.blocks]
    for batch in heldout(trainer.heldout_shards, LENGTH, 4):
        selections = model(batch.tokens_T, batch.stream).selections
        for index, look in enumerate(looks):
            ends = torch.tensor([0, *batch.stream.lengths]).cumsum(0).tolist()
            for here in (slice(a, b) for a, b in pairwise(ends) if b - a > 2 * TAKEN * BLOCK):
                spec = trainer.run.model.layers[index].attention
                sums += torch.tensor(found(spec, look, here, selections[index].blocks_THJ[here]))
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


@pytest.mark.parametrize("kind", GATES)
def test_t17_gates_learn_from_a_frozen_model(base, kind, tmp_path):
    gates = distilled(base, GATES[kind], tmp_path)
    frozen = base[1].model.state_dict()
    own = gates.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in frozen.items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["indexer"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    gate, means = recalls(gates)
    print(f"{kind}: kl {first:.3f} -> {last:.3f}, recall gate {gate:.3f}, means {means:.3f}")
    assert last < 0.7 * first
    assert gate > means + 0.05
