"""Position codes: what moves, what stays, and the published formulas by independent scalar arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from cases import built, close, params, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full
from sextant.axes.kv import GQA, ALiBi, LinearScaling, Llama3Scaling, NoPE, RoPE, YaRNScaling
from sextant.core.errors import UsageError
from sextant.core.stream import Stream


def turned(code: RoPE, x_TGK: Tensor, start: int = 0) -> Tensor:
    """Rows of one sequence, the first at position ``start``."""
    stream = Stream.of_lengths([len(x_TGK)])
    stream = replace(stream, positions_T=stream.positions_T + start)
    return code.build(x_TGK.shape[1], x_TGK.shape[2])(x_TGK, x_TGK, stream)[0]


def frequencies(code: RoPE, head_dim: int) -> list[float]:
    return code.build(1, head_dim).frequencies


SCALED = [
    RoPE(),
    RoPE(fraction=0.5),
    RoPE(layout="interleaved"),
    RoPE(scaling=LinearScaling(factor=4.0)),
    RoPE(scaling=Llama3Scaling(factor=8.0, original=16)),
    RoPE(scaling=YaRNScaling(factor=4.0, original=16)),
]


@pytest.mark.parametrize("code", params(SCALED))
def test_rope_scores_depend_on_the_distance_alone(code):
    q, k = (torch.randn(6, 1, 8, dtype=torch.float64) for _ in range(2))
    near = torch.einsum("tgk,sgk->ts", turned(code, q), turned(code, k))
    far = torch.einsum("tgk,sgk->ts", turned(code, q, 100_003), turned(code, k, 100_003))
    close(far, near, 1e-9)
    other = torch.einsum("tgk,sgk->ts", turned(code, q, 1), turned(code, k))
    assert (other - near).abs().max() > 1e-2


def test_fp32_scores_at_long_positions_stay_close():
    """fp32 angles at 100,000 are off by about 1e-2 of a turn's digits: the scores move by little."""
    q, k = (torch.randn(6, 1, 8) for _ in range(2))
    near, far = (torch.einsum("tgk,sgk->ts", turned(RoPE(), q, s), turned(RoPE(), k, s)) for s in (0, 100_000))
    close(far, near, 5e-2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_by_definition(layout):
    """Channel pair i of token t turns by t * base^(-2i/n)."""
    x = torch.randn(5, 1, 6, dtype=torch.float64)
    got = turned(RoPE(base=100.0, layout=layout), x)
    for t in range(5):
        for i in range(3):
            first, second = (i, i + 3) if layout == "half" else (2 * i, 2 * i + 1)
            angle = t * 100.0 ** (-2 * i / 6)
            a, b = float(x[t, 0, first]), float(x[t, 0, second])
            assert float(got[t, 0, first]) == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-12)
            assert float(got[t, 0, second]) == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-12)


def test_partial_rope_leaves_the_rest_and_uses_its_own_width():
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    got = turned(RoPE(fraction=0.5), x, start=3)
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert torch.equal(got[..., :4], turned(RoPE(), x[..., :4], start=3))
    assert frequencies(RoPE(fraction=0.5), 8) == pytest.approx([1.0, 10_000.0**-0.5])


def test_layouts_are_a_permutation_of_each_other():
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    close(turned(RoPE(layout="interleaved"), x, 7)[..., order], turned(RoPE(), x[..., order], 7), 1e-14)
    assert not torch.allclose(turned(RoPE(layout="interleaved"), x, 7), turned(RoPE(), x, 7))


def test_long_positions_change_no_part_of_the_code():
    """There is no table: token 5 turns alike in a stream of 6 and of 300,000."""
    rotary = RoPE().build(1, 8)
    short, long = (rotary.turns(torch.arange(n), torch.float32) for n in (6, 300_000))
    assert all(torch.equal(a, b[:6]) for a, b in zip(short, long, strict=True))


def test_nope_sees_a_set():
    """Without a code, permuting the earlier keys leaves a query's output alone; with rope it does not."""
    tokens_T = random_tokens(9)
    shuffled_T = torch.cat([tokens_T[:-1][torch.randperm(8)], tokens_T[-1:]])
    for position, same in ((NoPE(), True), (RoPE(), False)):
        model = built(Full(), GQA(heads=4, kv_heads=2, head_dim=8, position=position), layers=1)
        before, after = (run(model, x_T, [9])[-1] for x_T in (tokens_T, shuffled_T))
        assert torch.allclose(before, after, atol=1e-11) is same


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
    ],
)
def test_alibi_slopes(heads, want):
    """A geometric series for powers of two, else that of the next lower power and every other of the next."""
    slopes_H = ALiBi().build(heads, 8).slopes_H
    assert slopes_H is not None
    assert slopes_H.tolist() == want


def test_alibi_follows_its_model_to_another_dtype():
    model = built(Full(), GQA(heads=4, kv_heads=2, head_dim=8, position=ALiBi()), layers=1)
    assert model.blocks[0].attention.kv.scores.slopes_H.dtype == torch.float64  # type: ignore[union-attr]
    assert not [key for key in model.state_dict() if "slopes" in key]


def test_linear_scaling_is_a_slower_clock():
    x = torch.randn(9, 1, 8, dtype=torch.float64)
    slow = turned(RoPE(scaling=LinearScaling(factor=4.0)), x)
    close(slow[::4], turned(RoPE(), x[::4]), 1e-14)


def test_llama3_scaling_by_scalar_arithmetic():
    """Llama 3.1's published rule in terms of wavelengths."""
    got = frequencies(RoPE(base=5e5, scaling=Llama3Scaling(factor=8.0, original=8192)), 128)
    for i, frequency in enumerate(got):
        plain = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            want = plain
        elif wavelength > 8192 / 1:
            want = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(want, rel=1e-12)
    assert got[0] == 1.0
    assert got[-1] == pytest.approx(5e5 ** (-126 / 128) / 8)


def yarn_scalar(i: int, n: int, base: float, factor: float, original: int, fast: float, slow: float) -> float:
    """Equations of 2309.00071 for pair i of n channels, with whole correction limits."""

    def limit(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(limit(fast)), 0), min(math.ceil(limit(slow)), n - 1)
    ramp = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
    plain = base ** (-2 * i / n)
    return plain / factor * ramp + plain * (1 - ramp)


def test_yarn_by_scalar_arithmetic():
    code = RoPE(scaling=YaRNScaling(factor=40.0, original=4096))
    got = frequencies(code, 64)
    want = [yarn_scalar(i, 64, 1e4, 40.0, 4096, 32.0, 1.0) for i in range(32)]
    assert got == pytest.approx(want, rel=1e-12)
    assert got[0] == 1.0
    assert got[-1] == pytest.approx(1e4 ** (-62 / 64) / 40)
    assert code.build(1, 64).magnitude == pytest.approx(0.1 * math.log(40.0) + 1)


def test_yarn_temperature_variants():
    """DeepSeek's pair of mscales cancels when equal; an explicit factor wins; a factor of 1 changes nothing."""

    def magnitude(**fields: object) -> float:
        return RoPE(scaling=YaRNScaling(original=4096, **fields)).build(1, 64).magnitude  # type: ignore[arg-type]

    assert magnitude(factor=40.0, mscale_all_dim=1.0) == 1.0
    assert magnitude(factor=40.0, mscale=0.707, mscale_all_dim=1.0) == pytest.approx(
        (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    )
    assert magnitude(factor=40.0, attention_factor=1.25) == 1.25
    assert magnitude(factor=1.0) == 1.0
    assert frequencies(RoPE(scaling=YaRNScaling(factor=1.0, original=64)), 8) == pytest.approx(frequencies(RoPE(), 8))


@pytest.mark.parametrize(("fraction", "turning"), [(0.3, 4), (0.125, 2), (0.5, 8), (1.0, 16)])
def test_a_fraction_turns_whole_channels(fraction, turning):
    assert RoPE(fraction=fraction).rotary_dim(16) == turning


def test_yarn_limits_in_order():
    with pytest.raises(UsageError, match="beta_fast 1 must not be below beta_slow 32"):
        YaRNScaling.parse({"factor": 4.0, "original": 64, "beta_fast": 1.0, "beta_slow": 32.0})
