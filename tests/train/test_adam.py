"""AdamW with bf16 moments: beside torch's with fp32 ones (FP8-8), its rounding, its bytes, and resumed bit for bit."""

import pytest
import torch
from test_loop import corpus, losses, run, same_weights, trained  # noqa: F401 - fixtures

from sextant.train.adam import LowMomentAdamW, rounded_at_random
from sextant.train.optim import AdamW

BETAS = (0.9, 0.95)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression(optimiser_of, steps: int = 300) -> torch.Tensor:
    """The weights after each step of a noisy least-squares fit whose features differ in size by a factor 1,000."""
    draw = draws(0)
    scales, truth = torch.logspace(-1.5, 1.5, 20), torch.randn(20, 4, generator=draw)
    weight = torch.nn.Parameter(torch.zeros(20, 4))
    optimiser, path = optimiser_of([weight]), []
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 20, generator=draw) * scales
        y = x @ (truth / scales[:, None]) + 0.1 * torch.randn(32, 4, generator=draw)
        weight.grad = 2 * x.t() @ (x @ weight.detach() - y) / 32
        optimiser.step()
        path.append(weight.detach().clone())
    return torch.stack(path)


def low(params) -> LowMomentAdamW:
    return LowMomentAdamW(params, lr=0.02, betas=BETAS, eps=1e-8)


def full(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02, betas=BETAS, eps=1e-8, weight_decay=0.0)


def test_fp8_8_trajectory_is_that_of_fp32_moments_within_one_per_cent():
    got, want = regression(low), regression(full)
    off = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert 0 < off.max() < 0.01


def test_fp8_8_masters_take_updates_below_a_bf16_step():
    """Steps of 1e-4 at 1: a bf16 parameter, whose neighbours are 1/128 and 1/256 away, would stand still."""
    master = torch.nn.Parameter(torch.ones(8))
    optimiser = LowMomentAdamW([master], lr=1e-4, betas=BETAS, eps=1e-8)
    for _ in range(10):
        master.grad = torch.ones(8)
        optimiser.step()
    torch.testing.assert_close(master.detach(), torch.full((8,), 1 - 1e-3), rtol=0, atol=1e-5)
    assert torch.equal(torch.ones(8).bfloat16() - 1e-4, torch.ones(8).bfloat16())


def test_one_step_with_decay_is_torchs():
    start, grad = torch.randn(7, 3, generator=draws(1)), torch.randn(7, 3, generator=draws(2))
    ended = []
    for kind in (LowMomentAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimiser = kind([{"params": [weight], "weight_decay": 0.5}], lr=0.1, betas=BETAS, eps=1e-8)
        weight.grad = grad.clone()
        optimiser.step()
        ended.append(weight.detach())
    torch.testing.assert_close(*ended, rtol=1e-6, atol=1e-7)


def test_a_second_moment_dies_away_once_gradients_do():
    """At beta2 0.999 a moment loses 1 part in 1,000 a step, which no rounding to the nearest would show."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimiser = LowMomentAdamW([weight], lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    torch.manual_seed(0)
    for grad in [1.0] + 1000 * [0.0]:
        weight.grad = torch.full((4096,), grad)
        optimiser.step()
    square = optimiser.state[weight]["exp_avg_sq"]
    assert square.float().mean().item() == pytest.approx(1e-3 * 0.999**1000, rel=0.03)
    held = torch.tensor(1e-3).bfloat16()
    assert (held.float() * 0.999).bfloat16() == held


def test_rounding_at_random_takes_a_neighbour_with_the_right_odds():
    x = torch.randn(64, generator=draws(3)) * torch.logspace(-30, 30, 64)
    torch.manual_seed(0)
    drawn = torch.stack([rounded_at_random(x).double() for _ in range(4000)])
    step = x.double().abs() * 2.0**-7
    assert ((drawn - x).abs() < step).all() and all(len(column.unique()) <= 2 for column in drawn.T)
    assert ((drawn.mean(0) - x).abs() < 4 * step / 2 / 4000**0.5).all()


def test_rounding_at_random_leaves_what_bf16_can_hold():
    special = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, float("inf"), float("-inf")])
    assert torch.equal(rounded_at_random(special).float(), special)
    assert rounded_at_random(torch.tensor([float("nan")])).isnan().all()


def test_moments_take_half_the_bytes_of_fp32_ones(run, tmp_path):  # noqa: F811
    sizes, files = {}, {}
    for moments in ("fp32", "bf16"):
        trainer = trained(run.replace(optimiser=AdamW(moments=moments)), tmp_path / moments, until=1)
        states = trainer.optimiser.tensors()
        sizes[moments] = sum(t.numel() * t.element_size() for n, t in states.items() if not n.endswith(".step"))
        files[moments] = (tmp_path / moments / "checkpoints/step-00000001/optimizer.safetensors").stat().st_size
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert sizes == {"fp32": 8 * parameters, "bf16": 4 * parameters}
    assert files["fp32"] - files["bf16"] == pytest.approx(4 * parameters, rel=0.05)


def test_resumes_equal_the_unbroken_run(run, tmp_path):  # noqa: F811
    """Draws are seeded by step, so random rounding repeats too."""
    run = run.replace(optimiser=AdamW(moments="bf16"), eval_every=1000, save_every=1000)
    unbroken = trained(run, tmp_path / "unbroken")
    for step in (1, 5):
        trained(run, tmp_path / "broken", until=step)
    resumed = trained(run, tmp_path / "broken")
    assert same_weights(unbroken, resumed) and losses(tmp_path / "unbroken") == losses(tmp_path / "broken")
    ours, theirs = unbroken.optimiser.tensors(), resumed.optimiser.tensors()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
