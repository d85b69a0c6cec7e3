"""Beginning with another run's weights, and training only some of them: what is loaded, what is refused, what moves."""

import pytest
import torch
from test_loop import corpus, quiet, run, trained  # noqa: F401 - fixtures

from sextant.core.errors import CheckpointError, UsageError
from sextant.train import checkpoint
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.optim import AdamW, Muon, learning, train_only


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def begun(run, path, **changes):  # noqa: F811
    """A second run that has not made a step yet, and what it said."""
    said: list[str] = []
    with RunFolder(path) as folder:
        return Trainer(run.replace(name="second", **changes), folder, say=said.append), said


def test_a_run_begins_with_the_weights_of_another(run, tmp_path):  # noqa: F811
    first = trained(run, tmp_path / "first", until=2)
    for source in ("first", "first/checkpoints/step-00000002"):
        second, said = begun(run, tmp_path / f"to-{len(source)}", init_from=str(tmp_path / source), seed=9)
        assert all(torch.equal(x, weights(second)[name]) for name, x in weights(first).items())
        assert second.step == 0 and not second.optimiser.tensors()
        assert any("parameters of" in line and "0 start fresh" in line for line in said)


def test_a_resumed_run_does_not_begin_again(run, tmp_path):  # noqa: F811
    trained(run, tmp_path / "first", until=2)
    second = run.replace(name="second", init_from=str(tmp_path / "first"))
    halfway = trained(second, tmp_path / "second", until=3)
    again, said = begun(second, tmp_path / "second")
    assert again.step == 3 and all(torch.equal(x, weights(again)[name]) for name, x in weights(halfway).items())
    assert not any("begins" in line for line in said)


def test_missing_weights_are_refused_unless_they_are_what_is_trained(run, tmp_path):  # noqa: F811
    trained(run, tmp_path / "first", until=1)
    untied = run.replace(model=run.model.replace(tied=False))
    with pytest.raises(CheckpointError, match=r"do not fit the model.*head\.weight got nothing"):
        begun(untied, tmp_path / "a", init_from=str(tmp_path / "first"))
    second, said = begun(untied, tmp_path / "b", init_from=str(tmp_path / "first"), train_only="head.*")
    assert list(learning(second.model)) == ["head.weight"]
    assert any(line.endswith("4.80 k start fresh") for line in said), said


def test_other_shapes_and_no_weights_are_refused(run, tmp_path):  # noqa: F811
    trained(run, tmp_path / "first", until=1)
    wide = run.override("model.layers[0].feed_forward.hidden=24")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.feed_forward\.\w+\.weight got"):
        begun(wide, tmp_path / "a", init_from=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"no weights to begin with.*Train that run first"):
        begun(run, tmp_path / "b", init_from=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("source", ["model.pt", ""], ids=["file", "folder"])
def test_a_pickle_to_begin_with_is_named(run, tmp_path, source):  # noqa: F811
    (tmp_path / "model.pt").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickle file, which can run code"):
        begun(run, tmp_path / "second", init_from=str(tmp_path / source))


def test_weights_of_another_tokenizer_are_refused(run, tmp_path):  # noqa: F811
    trained(run, tmp_path / "first", until=1)
    found = checkpoint.load(tmp_path / "first/checkpoints/step-00000001")
    identity = {**found.manifest["identity"], "tokenizer": "another"}
    checkpoint.save(tmp_path / "other", 1, found.parts, found.state, identity)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        begun(run, tmp_path / "second", init_from=str(tmp_path / "other/step-00000001"))


@pytest.mark.parametrize("optimiser", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_frozen_weights_keep_every_bit_and_resume(run, tmp_path, optimiser):  # noqa: F811
    run = run.replace(optimiser=optimiser, train_only="blocks.*.feed_forward.*")
    before = weights(begun(run, tmp_path / "fresh")[0])
    trained(run, tmp_path / "a", until=3)
    resumed, whole = trained(run, tmp_path / "a", until=6), trained(run, tmp_path / "b", until=6)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, before[name]) == (".feed_forward." not in name), name
        assert torch.equal(tensor, weights(resumed)[name])
    assert set(whole.optimiser.tensors()) and all(".feed_forward." in name for name in whole.optimiser.tensors())


def test_a_pattern_that_matches_nothing_is_refused(run):  # noqa: F811
    model = run.model.build(device="meta")
    with pytest.raises(UsageError, match=r"no parameter to train: train_only \(got \*gaet\*"):
        train_only(model, "*gaet*")
    assert train_only(model, "*norm*") == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
