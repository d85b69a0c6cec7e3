"""A folder of another run: what may not change when one goes on is refused by the name of the field."""

import pytest
from test_loop import corpus, quiet, run, trained  # noqa: F401 - fixtures

from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed
from sextant.core.errors import UsageError
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.optim import AdamW, Muon

CHANGES = [
    (["numerics.kind=bf16"], r"numerics\.kind \(got bf16, expected fp32\)"),
    (["numerics.kind=fp8_delayed"], r"numerics\.kind \(got fp8_delayed, expected fp32\)"),
    (["optimiser.moments=bf16"], r"optimiser\.moments \(got bf16, expected fp32\)"),
    (["optimiser.kind=muon"], r"optimiser\.kind"),
    (["model.layers[1].feed_forward.experts=8"], r"model\.layers\[1\]\.feed_forward\.experts \(got 8, expected 4\)"),
    (["model.layers[1].feed_forward.router.top_k=1"], r"model\.layers\[1\]\.feed_forward\.router\.top_k"),
    (["model.layers[1].feed_forward.hidden=16"], r"model\.layers\[1\]\.feed_forward\.hidden"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "tiny"


def refused(run, path, match: str) -> None:  # noqa: F811
    before = (path / "config.yaml").read_text()
    with RunFolder(path) as folder, pytest.raises(UsageError, match=match) as error:
        Trainer(run, folder, say=quiet)
    assert error.value.exit_code == 2
    assert (path / "config.yaml").read_text() == before


@pytest.mark.parametrize(("settings", "match"), CHANGES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_another_run_is_refused_by_field(settings, match, run, folder):  # noqa: F811
    if not folder.exists():
        trained(run, folder, until=1)
    if settings == ["optimiser.kind=muon"]:
        refused(run.replace(optimiser=Muon()), folder, match)
    else:
        refused(run.override(*settings), folder, match)


FIELDS = [
    (FP8Delayed(history=5), FP8Delayed(history=7), r"numerics\.history \(got 7, expected 5\)"),
    (FP8Delayed(), FP8Delayed(data_gradient="e4m3"), r"numerics\.data_gradient \(got e4m3, expected e5m2\)"),
    (FP8Delayed(), FP8Blocks(), r"numerics\.kind \(got fp8_blocks, expected fp8_delayed\)"),
    (FP8Delayed(), BF16(), r"numerics\.kind \(got bf16, expected fp8_delayed\)"),
    (FP8Blocks(), FP8Blocks(power_of_two=True), r"numerics\.power_of_two"),
]


@pytest.mark.parametrize(("before", "after", "match"), FIELDS)
def test_another_fp8_recipe_is_refused_by_field(before, after, match, run, tmp_path):  # noqa: F811
    trained(run.replace(numerics=before), tmp_path, until=1)
    refused(run.replace(numerics=after), tmp_path, match)


def test_the_rate_may_change_but_not_how_moments_are_kept(run, tmp_path):  # noqa: F811
    low = AdamW(moments="bf16")
    trained(run.replace(optimiser=low), tmp_path, until=1)
    trained(run.replace(optimiser=low.replace(lr=1e-4)), tmp_path, until=2)
    refused(run.replace(optimiser=AdamW()), tmp_path, r"optimiser\.moments \(got fp32, expected bf16\)")
