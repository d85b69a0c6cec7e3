"""Balance over whole steps: accumulation, recomputation, ranks, the bias in the loop, resume, what is reported."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_loop import corpus, quiet, same_weights, trained  # noqa: F401 - a fixture among them
from torch import Tensor

from sextant import recipes
from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA
from sextant.axes.routing import (
    Auxiliary,
    Bias,
    Capacity,
    Communication,
    Device,
    Importance,
    NoisyTopK,
    Routing,
    SigmoidTopK,
    SmoothLoad,
    SoftmaxTopK,
    Usage,
)
from sextant.axes.stability import NormalInit
from sextant.core.stream import Stream
from sextant.model.spec import Layer, ModelSpec
from sextant.train.balance import Balance, Load, Tally
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.loss import micro_loss
from sextant.train.status import StepReport

EXPERTS = 6
ROUTERS = {
    "sigmoid": (SigmoidTopK(top_k=2), (
        Bias(rate=0.1), Auxiliary(coef=0.5, scope="global_batch"), Auxiliary(coef=0.3, scope="sequence"),
    )),
    "softmax": (SoftmaxTopK(top_k=2, bias=True), (
        Bias(rate=0.1, rule="proportional"), Importance(scope="global_batch"), Device(devices=3, scope="global_batch"),
        Communication(devices=3, limit=2, scope="global_batch"),
    )),
}
EACH = pytest.mark.parametrize("name", ROUTERS)


def spec_of(router, balance, **fields) -> ModelSpec:
    """Two MoE layers whose routers really choose."""
    ffn = Experts(experts=EXPERTS, hidden=8, router=router, balance=balance, **fields)
    layer = Layer(kv=GQA(heads=2, kv_heads=1, head_dim=8), feed_forward=ffn)
    return ModelSpec(name="tiny", vocab=300, width=16, context=32, layers=(layer, layer), init=NormalInit(std=0.4))


def step_of(spec: ModelSpec, tokens_BT: Tensor, rows: int, *, recompute: bool = False, reduce=None, of_all: int = 1):
    """One step on micro-batches of ``rows``, in fp64, of a step that is ``of_all`` times as large.

    Returns the balance loss, all gradients and all biases after the update.
    """
    model = spec.build(seed=3).double()
    model.recompute = recompute
    model.train()
    balance = Balance(spec) if reduce is None else Balance(spec, reduce)
    parts = [(part, Stream.of_lengths(len(part) * [part.shape[1]])) for part in tokens_BT.split(rows)]
    if balance.ahead and len(parts) > 1:
        balance.foresee(model(part.flatten(), stream).routings for part, stream in parts)
    total, extra = of_all * tokens_BT.numel(), 0.0
    for part, stream in parts:
        targets_T = part.roll(-1, dims=1).flatten()
        loss = micro_loss(model, part.flatten(), targets_T, stream, balance, total, total)
        loss.total.backward()
        extra += float(loss.balance)
    balance.update(model, 0.0)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    biases_LE = torch.stack([block.feed_forward.router.bias.value_E for block in model.blocks])
    return extra, gradients, biases_LE


def some_tokens(rows: int) -> Tensor:
    return torch.randint(300, (rows, 11), generator=torch.Generator().manual_seed(4))


def same_step(one, other) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(one[2], other[2]) and one[2].abs().mean() > 0.01


@EACH
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_accumulation_and_recomputation_equal_one_big_batch(name, rows, recompute):
    """MOE-9: loss, gradients and the biases that the counts move, over one, two and three rows at a time."""
    spec, tokens_BT = spec_of(*ROUTERS[name]), some_tokens(6)
    same_step(step_of(spec, tokens_BT, rows, recompute=recompute), step_of(spec, tokens_BT, 6))


def test_without_foresight_the_counts_are_running():
    """What the first pass is for: the sums so far give another loss."""
    spec, tokens_BT = spec_of(*ROUTERS["sigmoid"]), some_tokens(6)
    running = spec.override("layers[*].feed_forward.balance[1].scope=running")
    exact, rough = step_of(spec, tokens_BT, 2), step_of(running, tokens_BT, 2)
    assert exact[0] != pytest.approx(rough[0], rel=1e-4)
    assert torch.equal(exact[2], rough[2])
    assert step_of(running, tokens_BT, 6)[0] == pytest.approx(step_of(spec, tokens_BT, 6)[0], rel=1e-12)


def added_up(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def on_rank(rank: int, folder: str) -> None:
    """Half of the batch, in two micro-batches or one; gradients and losses summed over the two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, (router, terms) in ROUTERS.items():
        for rows in (1, 2):
            half_BT = some_tokens(4)[2 * rank : 2 * rank + 2]
            extra, gradients, biases_LE = step_of(spec_of(router, terms), half_BT, rows, reduce=added_up, of_all=2)
            extra, gradients = added_up(torch.tensor(extra, dtype=torch.float64)), added_up(gradients)
            found = {"extra": extra, "gradients": gradients, "biases_LE": biases_LE}
            save_file(found, f"{folder}/{name}-{rows}-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_of_half_a_batch_equal_one(tmp_path):
    """MAI-Base-1, section 9.4: two processes over gloo, loss, gradients and biases."""
    context = torch.multiprocessing.get_context("spawn")  # a fork would inherit autograd's threads
    ranks = [context.Process(target=on_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for name, parts in ROUTERS.items():
        whole = step_of(spec_of(*parts), some_tokens(4), 4)
        for path in sorted(tmp_path.glob(f"{name}-*")):
            found = load_file(path)
            same_step((found["extra"].item(), found["gradients"], found["biases_LE"]), whole)
    assert len(list(tmp_path.glob("*.safetensors"))) == 8


# the loop


@pytest.fixture
def run(corpus):  # noqa: F811
    """A V3-shaped run small enough for many steps."""
    nano = recipes.get("nano").twin()
    model = spec_of(SigmoidTopK(top_k=2), (Bias(rate=0.01, until=0.75), Auxiliary(coef=0.01, scope="global_batch")))
    return nano.replace(
        name="tiny", model=model, data=nano.data.replace(source=str(corpus), vocab=300, seq_len=32), steps=12,
        batch=nano.batch.replace(rows=4, micro_rows=2), schedule=nano.schedule.replace(warmup=3), save_every=100,
        eval_every=100, sample_every=1000, log_every=1, eval_tokens=200,
    )


def biases_LE(trainer: Trainer) -> Tensor:
    return torch.stack([block.feed_forward.router.bias.value_E.clone() for block in trainer.model.blocks])


def test_the_bias_follows_each_update_and_rests_at_the_end(run, tmp_path):
    """By the rate against the step's own counts; after three quarters of the run it stays."""
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        for step in range(12):
            before_LE = biases_LE(trainer)
            trainer._advance()
            counts_LE = torch.stack([sum(tally.counts) for tally in trainer.balance.tallies.values()])
            assert counts_LE.sum(1).tolist() == [4 * 32 * 2] * 2
            pull_LE = (counts_LE.double().mean(1, keepdim=True) - counts_LE).sign()
            want_LE = before_LE + (0.01 * pull_LE if step < 9 else 0)
            torch.testing.assert_close(biases_LE(trainer), want_LE.float(), rtol=0, atol=1e-7)


def test_evaluation_and_a_skipped_step_leave_the_bias(run, tmp_path, monkeypatch):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        trainer._advance()
        before_LE = biases_LE(trainer)
        trainer._evaluate(200)
        monkeypatch.setattr(trainer.spikes, "is_spike", lambda loss, norm: True)
        trainer._advance()
        assert torch.equal(biases_LE(trainer), before_LE) and before_LE.abs().max() > 0


def test_resume_is_bitwise_with_a_bias(run, tmp_path):
    unbroken = trained(run, tmp_path / "unbroken")
    for step in (3, 8):
        trained(run, tmp_path / "broken", until=step)
    resumed = trained(run, tmp_path / "broken")
    assert same_weights(unbroken, resumed)
    assert torch.equal(biases_LE(unbroken), biases_LE(resumed)) and biases_LE(resumed).abs().max() > 0


def test_noise_is_the_same_when_a_step_is_counted_and_when_it_is_learnt(run, tmp_path):
    """The first pass draws what the second draws: sums foreseen are those of what was then chosen."""
    terms = (SmoothLoad(scope="global_batch"), Auxiliary(scope="global_batch"))
    noisy = run.replace(model=spec_of(NoisyTopK(top_k=2, floor=0.5), terms))
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(noisy, folder, say=quiet)
        trainer._advance()
        for index, tally in trainer.balance.tallies.items():
            assert torch.equal(trainer.balance.sums[index, 1], sum(tally.counts))


# what is reported


def test_load_by_hand():
    """Two forwards of a layer: 12 copies sent, 3 of them dropped, 4 rows of padding among 14."""
    logits_TE = torch.zeros(3, 4)
    kept_TA = torch.tensor([[True, True], [True, False], [False, True]])
    tally = Tally()
    for experts_TA, kept, usage in (
        ([[0, 1], [0, 1], [0, 2]], kept_TA, Usage(rows=8, peak=5, rounds=2, padding=4)),
        ([[0, 1], [1, 0], [2, 0]], kept_TA | kept_TA.flip(1), Usage(rows=torch.tensor(6), peak=torch.tensor(6))),
    ):
        tally.add(Routing(logits_TE, logits_TE, torch.tensor(experts_TA), torch.ones(3, 2), kept_TA=kept, usage=usage))
    load = tally.load(lambda sums: sums)
    assert load.max_over_mean == pytest.approx(6 / 3) and load.max_vio == pytest.approx(1.0)
    assert load.unused == 0.25 and 0 < load.entropy < 1
    assert load.drop_rate == pytest.approx(2 / 12) and load.padding_waste == pytest.approx(4 / 14)
    assert (load.peak_rows, load.rounds) == (6, 2)


def report(*loads: Load) -> StepReport:
    return StepReport(
        step=1, steps=2, loss=1.0, bpb=1.0, balance=0.0, gnorm=1.0, lr=1e-3, rows=1, tokens=1, seconds=1.0,
        tokens_per_second=1.0, mfu=None, memory=1, eta=1.0, skipped=0, load=dict(enumerate(loads)),
    )


def test_the_status_line_tells_of_drops_only_when_there_are_some():
    even = Load(max_over_mean=1.0, unused=0.0, entropy=1.0)
    assert "dropped" not in report(even).line()
    some = Load(max_over_mean=2.5, unused=0.0, entropy=0.9, drop_rate=0.05)
    assert "| load max/mean 2.5 | dropped 2.5% |" in report(even, some).line()


def test_metrics_hold_every_number_of_the_load(run, tmp_path):
    said: list[str] = []
    dropping = run.replace(model=spec_of(SigmoidTopK(top_k=2), (), overflow=Capacity(factor=0.5)), steps=2)
    with RunFolder(tmp_path) as folder:
        Trainer(dropping, folder, say=said.append).fit()
    for line in (Path(tmp_path) / "metrics.jsonl").read_text().splitlines():
        for load in json.loads(line)["load"].values():
            assert set(load) == set(Load.__dataclass_fields__)
            assert 0.3 < load["drop_rate"] < 1 and load["max_vio"] == load["max_over_mean"] - 1
    assert any("dropped" in line for line in said)
