"""Attention changes during a run: same weights, same optimiser, bitwise resume across the change (T16, L17)."""

import json

import pytest
import torch
from test_loop import corpus, losses, quiet, same_weights, trained  # noqa: F401 - a fixture among them

from sextant import recipes
from sextant.axes.attention import Full, MoBA, Window
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.model.spec import ModelSpec
from sextant.model.switch import attending, switch
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.run import Run, Stage, check_run

SPARSE = MoBA(block=4, top_k=2)


@pytest.fixture
def run(corpus) -> Run:  # noqa: F811
    """Two full layers that read sparsely until half of the steps, then only the lower one until three quarters."""
    nano = recipes.get("nano").twin()
    layer = nano.model.layers[-1]
    kv = layer.kv.replace(heads=2, kv_heads=1, head_dim=8)
    layers = 2 * (layer.replace(kv=kv, feed_forward=layer.feed_forward.replace(hidden=32)),)
    return nano.replace(
        name="tiny", model=ModelSpec(name="tiny", vocab=300, width=16, context=32, tied=True, layers=layers),
        data=nano.data.replace(source=str(corpus), vocab=300, seq_len=32), steps=12,
        batch=nano.batch.replace(rows=4, micro_rows=2), schedule=nano.schedule.replace(warmup=3), save_every=100,
        eval_every=100, eval_tokens=200,
        stages=(Stage(until=0.5, attention=(SPARSE, SPARSE)), Stage(until=0.75, attention=(SPARSE, Full()))),
    )


def patterns(trainer: Trainer) -> list[str]:
    return [layer.attention.kind for layer in trainer.model.spec.layers]


def test_patterns_change_at_their_steps_and_nothing_else_does(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        names, seen = list(trainer.model.state_dict()), []
        for _ in range(12):
            weights = [p.data_ptr() for p in trainer.model.parameters()]
            trainer._advance()
            seen.append(patterns(trainer))
            assert weights == [p.data_ptr() for p in trainer.model.parameters()]
            assert all(int(step) == trainer.step for name, step in trainer.optimiser.tensors().items()
                       if name.endswith(".step"))
        assert seen == 6 * [["moba", "moba"]] + 3 * [["moba", "full"]] + 3 * [["full", "full"]]
        assert list(trainer.model.state_dict()) == names
        built = [type(block.attention.pattern).__name__ for block in trainer.model.blocks]
        assert len(set(built)) == 1 and "MoBA" not in built[0]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    stages = [event for event in events if event["event"] == "stage"]
    assert [event["step"] for event in stages] == [6, 9]
    assert [[a["kind"] for a in event["attention"]] for event in stages] == [["moba", "full"], ["full", "full"]]


def test_the_first_steps_are_those_of_a_sparse_run_and_the_rest_are_not(run, tmp_path):
    """The stages are real: until the change, bit for bit a run whose own patterns are sparse."""
    trained(run, tmp_path / "staged")
    sparse = run.replace(model=attending(run.model, (SPARSE, SPARSE)), stages=())
    trained(sparse, tmp_path / "sparse")
    trained(run.replace(stages=()), tmp_path / "full")
    staged, sparse, full = (losses(tmp_path / name) for name in ("staged", "sparse", "full"))
    assert staged[:6] == sparse[:6] and staged[6] != sparse[6]
    assert staged[0] != full[0]


def test_no_spike_at_a_change(run, tmp_path):
    """T16: the loss at a change is finite and no worse than the wobble around it."""
    trained(run.replace(steps=80), tmp_path)
    lines = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for at in (40, 60):
        before = torch.tensor(lines[at - 10 : at])
        assert lines[at] < float(before.mean() + 6 * before.std())


@pytest.mark.parametrize("stop", [5, 6, 7, 9])
def test_resume_across_a_change_is_bitwise(run, tmp_path, stop):
    unbroken = trained(run, tmp_path / "unbroken")
    trained(run, tmp_path / "broken", until=stop)
    resumed = trained(run, tmp_path / "broken")
    assert same_weights(unbroken, resumed)
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "broken")
    assert patterns(resumed) == ["full", "full"]


def test_a_change_of_stages_makes_it_another_run(run, tmp_path):
    trained(run, tmp_path, until=2)
    with pytest.raises(UsageError, match="another run"):
        trained(run.replace(stages=run.stages[:1]), tmp_path)


def test_stages_survive_yaml(run):
    assert Run.parse(json.loads(json.dumps(run.to_dict()))) == run


def refused(run: Run, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_run(run)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_patterns_with_parameters_are_refused(run):
    conv = SPARSE.replace(key_conv=3)
    refused(run.replace(stages=(Stage(until=0.5, attention=(SPARSE, conv)),)),
            "stages[0].attention[1]", "moba has 24 parameters of its own", "Change only patterns without parameters")
    own = run.model.replace(layers=(run.model.layers[0].replace(attention=conv), run.model.layers[1]))
    refused(run.replace(model=own), "stages[0].attention[0]", "moba has 24 parameters")
    check_run(run.replace(model=own, stages=(Stage(until=0.5, attention=(conv, SPARSE)),)))


def test_stages_must_fit_the_model(run):
    refused(run.replace(stages=(Stage(until=0.5, attention=(SPARSE,)),)), "stages[0].attention", "got 1, expected 2")
    wide = Window(window=64)
    refused(run.replace(stages=(Stage(until=0.5, attention=(wide, SPARSE)),)), "stages[0].model.layers[0]", "window 64")


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.75, 0.5), (0.01,), (0.99,)])
def test_stages_end_one_after_another_within_the_run(run, ends):
    with pytest.raises(UsageError, match="stages must end one after another"):
        run.replace(stages=[Stage(until=until, attention=(SPARSE, SPARSE)) for until in ends])


def test_full_to_sparse_and_back_leaves_a_model_as_it_was(run):
    """L17: one checkpoint reads in both modes, also while decoding."""
    model, tokens_T = run.model.build(seed=1), torch.arange(30)
    full = model.spec

    @torch.no_grad()
    def logits() -> torch.Tensor:
        memory = model.memory(1)
        model(tokens_T[:20], Stream.of_lengths([20], memory=memory))
        return model.logits(model(tokens_T[20:], Stream.of_lengths([10], memory=memory)).hidden_TD)

    before, weights = logits(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switch(model, attending(full, (SPARSE, SPARSE)))
    sparse = logits()
    switch(model, full)
    assert torch.equal(logits(), before) and not torch.equal(sparse, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
