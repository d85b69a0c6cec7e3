"""What all tests share: one thread, one seed per test, and no GPU tests where there is no GPU."""

import os
import signal

import pytest
import torch
from hypothesis import settings
from tally import ROWS, table, tally

from sextant.kernels import matmul

settings.register_profile("sextant", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("sextant")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are deselected without CUDA, so that a run on a CPU has nothing to skip."""
    if torch.cuda.is_available():
        return
    off = [item for item in items if item.get_closest_marker("gpu")]
    if off:
        config.hook.pytest_deselected(items=off)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_configure(config: pytest.Config) -> None:
    """Small tensors gain nothing from threads, and workers beside each other lose by them.

    A shell lets its background jobs ignore SIGINT, and children inherit that: tests of Ctrl-C want it heard.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where contract tests ran, their counts by row and check; workers report to the process that prints this."""
    stats = terminalreporter.stats
    for axes, kinds in ROWS.items():
        passed, failed = (
            tally([report.nodeid for outcome in outcomes for report in stats.get(outcome, [])], kinds)
            for outcomes in (["passed"], ["failed", "error"])
        )
        if passed or failed:
            terminalreporter.section(f"contracts: checks passed, by row of {axes}")
            for line in table(passed, failed, kinds):
                terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20260601)


@pytest.fixture(params=["native", "widened"])
def half_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply half precision, whichever this CPU would take."""
    slow = {"native": frozenset(), "widened": frozenset({torch.bfloat16, torch.float16})}
    monkeypatch.setattr(matmul, "SLOW", slow[request.param])
    return request.param
