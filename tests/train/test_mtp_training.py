"""Training with prediction modules: lambda, sums over micro-batches, balance, resume, what is reported."""

import json

import pytest
import torch
from test_loop import corpus, same_weights, trained  # noqa: F401 - fixtures

from sextant import recipes
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.routing import Auxiliary, Bias, SigmoidTopK, SoftmaxTopK
from sextant.core.cost import At
from sextant.core.stream import Stream
from sextant.kernels.loss import IGNORE, summed_loss
from sextant.model.mtp import MTP, LossWeight
from sextant.model.spec import Layer, ModelSpec
from sextant.model.transformer import Transformer
from sextant.train.balance import Balance
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.loss import MicroLoss, micro_loss
from sextant.train.run import Run

HEADS = GQA(heads=2, kv_heads=1, head_dim=6)
MOE = Experts(experts=6, hidden=7, router=SoftmaxTopK(top_k=2), balance=(Auxiliary(coef=0.1),))
LENGTHS = [9, 1, 6, 4]


def spec(mtp: MTP | None) -> ModelSpec:
    layers = (Layer(kv=HEADS, feed_forward=Dense(hidden=9)), Layer(kv=HEADS, feed_forward=MOE))
    return ModelSpec(name="tiny", vocab=23, width=10, context=64, layers=layers, mtp=mtp)


def build(mtp: MTP | None) -> Transformer:
    return spec(mtp).build(seed=2).double()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Stream]:
    tokens_T = torch.randint(23, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    targets_T = tokens_T.roll(-1)
    targets_T[[3, 9, 19]] = IGNORE
    return tokens_T, targets_T, Stream.of_lengths(LENGTHS)


def step(model: Transformer, weight: float, batches: int = 1) -> tuple[list[MicroLoss], dict[str, torch.Tensor | None]]:
    model.zero_grad()
    balance, losses = Balance(model.spec), []
    for number in range(batches):
        parts = batch(number)
        losses.append(micro_loss(model, *parts, balance, batches * 17, batches * 20, weight))
        losses[-1].total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def test_weight_zero_is_the_model_alone():
    """MTP-3: gradients bit for bit, none in the modules."""
    (plain,), expected = step(build(None), 0.0)
    (loss,), grads = step(build(MTP()), 0.0)
    assert torch.equal(loss.total, plain.total) and loss.mtp == 0
    for name, grad in grads.items():
        assert grad is None if name.startswith("mtp.") else torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("weight", [0.3, 0.1])
def test_the_loss_is_the_papers(weight):
    """L = L_main + (lambda / D) sum of the modules' losses over the global count, and the balance of their layers."""
    model = build(MTP(depth=2))
    (loss,), _ = step(model, weight)
    tokens_T, targets_T, stream = batch()
    out = model(tokens_T, stream, ahead=True)
    further = [summed_loss(one.out.hidden_TD, model.head_PD, targets_T[one.read_T]) for one in out.ahead]
    counted = [int((targets_T[one.read_T] != IGNORE).sum()) for one in out.ahead]
    assert counted == [14, 11]  # of the 16 and 13 rows, two of which have nothing to predict
    main = summed_loss(out.hidden_TD, model.head_PD, targets_T)
    expected = (main + weight / 2 * (further[0] + further[1])) / 17 + loss.balance
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.mtp, (further[0] + further[1]) / 2, rtol=1e-12, atol=0)
    balance = Balance(model.spec)
    alone = balance.loss(out.routings, stream, 20)
    for one in out.ahead:
        alone = alone + balance.loss(one.out.routings, one.stream, 20)
    torch.testing.assert_close(loss.balance, alone, rtol=1e-12, atol=0)


def test_micro_batches_add_up():
    """A packed batch, or each of its sequences by itself; without balance, whose scope here is the micro-batch."""
    bare = spec(MTP(depth=2)).override("layers[1].feed_forward.balance=[]")
    model, balance = bare.build(seed=2).double(), Balance(bare)
    tokens_T, targets_T, stream = batch()
    whole = micro_loss(model, tokens_T, targets_T, stream, balance, 17, 20, 0.3)
    pieces = [
        micro_loss(model, *parts, Stream.of_lengths([len(parts[0])]), balance, 17, 20, 0.3)
        for parts in zip(tokens_T.split(LENGTHS), targets_T.split(LENGTHS), strict=True)
    ]
    weights = list(model.parameters())
    ours = torch.autograd.grad(whole.total, weights)
    theirs = torch.autograd.grad(torch.stack([piece.total for piece in pieces]).sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_loads_are_counted_under_the_modules_index_once_with_recomputation():
    loads = []
    for recompute in (False, True):
        model = build(MTP(depth=2))
        model.recompute = recompute
        balance = Balance(model.spec)
        micro_loss(model, *batch(), balance, 17, 20, 0.3).total.backward()
        loads.append({index: int(sum(tally.counts).sum()) for index, tally in balance.tallies.items()})
    assert loads[0] == loads[1] == {1: 2 * 20, 2: 2 * 16, 3: 2 * 13}


def test_a_module_moves_its_own_selection_bias():
    moe = MOE.replace(router=SigmoidTopK(top_k=2, bias=True), balance=(Bias(rate=0.5),))
    layers = (Layer(kv=HEADS, feed_forward=moe), Layer(kv=HEADS, feed_forward=moe))
    model = spec(MTP()).replace(layers=layers).build(seed=2)
    balance = Balance(model.spec)
    tokens_T, targets_T, stream = batch()
    balance.start()
    micro_loss(model, tokens_T, targets_T, stream, balance, 17, 20, 0.3)
    routings = model(tokens_T, stream, ahead=True).all_routings
    balance.update(model, 0.0)
    for index, block in enumerate(model.all_blocks):
        counts_E = routings[index].counts_E().float()
        moved_E = block.feed_forward.get_submodule("router").get_buffer("bias.value_E")
        assert torch.equal(moved_E, 0.5 * (counts_E.mean() - counts_E).sign())


def test_compiled_blocks_give_the_same_gradients():
    dense = spec(MTP()).replace(layers=spec(None).layers[:1])
    plain, compiled = dense.build(seed=2).double(), dense.build(seed=2).double()
    for block in compiled.all_blocks:
        block.compile(backend="aot_eager")
    (_,), expected = step(plain, 0.3)
    (_,), grads = step(compiled, 0.3)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-10, msg=name)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(corpus) -> Run:  # noqa: F811
    """Lambda falls after half of the steps."""
    twin = recipes.get("nano").twin()
    model = spec(MTP(weight=LossWeight(first=0.5, later=0.0, until=0.5))).replace(vocab=300)
    return twin.replace(
        name="tiny", model=model, data=twin.data.replace(source=str(corpus), vocab=300, seq_len=32), steps=10,
        batch=twin.batch.replace(rows=4, micro_rows=2), schedule=twin.schedule.replace(warmup=2), save_every=1000,
        eval_every=1000, sample_every=1000, eval_tokens=200,
    )


def test_a_run_reports_its_modules_and_resumes_bit_for_bit(run, tmp_path):
    unbroken = trained(run, tmp_path / "unbroken")
    for until in (3, 7):
        trained(run, tmp_path / "broken", until=until)
    assert same_weights(unbroken, trained(run, tmp_path / "broken"))
    steps = [json.loads(line) for line in (tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mtp"] > 3 for row in steps] == 5 * [True] + 5 * [False] and steps[-1]["mtp"] == 0
    at = At(run.data.seq_len)
    assert set(steps[0]["load"]) == {"1", "2"} and set(steps[-1]["load"]) == {"1"}
    assert unbroken.clock.flops_per_token == run.model.cost(at).flops + run.model.mtp_cost(at).flops


def test_the_status_line_names_the_modules_loss(run, tmp_path):
    told: list[str] = []
    with RunFolder(tmp_path) as folder:
        Trainer(run.replace(steps=2), folder, say=told.append).fit()
    lines = [line for line in told if line.startswith("step ")]
    assert "| mtp 5." in lines[0] and "mtp" not in lines[1]
