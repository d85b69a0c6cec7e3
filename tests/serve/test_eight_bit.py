"""Matrices held in 8 bits: how far off each number may be, what stays 8-bit, and a model that still says the same."""

import json

import pytest
import torch
from cases import chunked, random_tokens
from cases import run as forward
from torch import Tensor
from typer.main import get_command

from sextant.axes.numerics import BF16, FP32, EightBit, eight_bit
from sextant.axes.stability import hidden_matrices
from sextant.cli import app, frame
from sextant.serve.generate import Generator, Weights, load, lower_weights
from sextant.serve.sampling import Sampling

pytestmark = pytest.mark.usefixtures("half_products")
KINDS, VOCAB = ["fp8", "int8"], 300


def largest(x: Tensor, kind: str) -> Tensor:
    """Of the block (fp8) or the 128 of a row (int8) that each number shares its scale with, by loops."""
    high, out = 128 if kind == "fp8" else 1, torch.empty_like(x)
    for row in range(0, x.shape[0], high):
        for column in range(0, x.shape[1], 128):
            part = x[row : row + high, column : column + 128]
            out[row : row + high, column : column + 128] = part.abs().max()
    return out


@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (128, 128), (3, 500)])
@pytest.mark.parametrize(("kind", "bound"), [("fp8", 16 / 448), ("int8", 1 / 254)])
def test_errors_are_within_half_a_step(kind, bound, shape):
    """FP8-1, and its like for whole numbers; a column of 1,000 times the size costs others only in its own group."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, -1] *= 1000
    small = eight_bit(x, kind, torch.float32)
    assert ((small.numbers() - x).abs() <= bound * largest(x, kind) * 1.0001).all()
    assert small.scaled.values.element_size() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_stacks_are_their_matrices(kind):
    stack = torch.randn(3, 130, 140, generator=torch.Generator().manual_seed(1))
    stack[1] = 0
    small = eight_bit(stack, kind, torch.float32)
    for index in range(3):
        assert torch.equal(small[index].numbers(), eight_bit(stack[index], kind, torch.float32).numbers())
    assert not small[1].numbers().any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_sees_the_numbers(kind):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    small = eight_bit(x, kind, torch.bfloat16)
    numbers = small.numbers()
    assert small.dtype == numbers.dtype == torch.bfloat16 and small.shape == x.shape
    rows = torch.randn(4, 5).bfloat16()
    with torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(rows, small), torch.nn.functional.linear(rows, numbers))
    assert torch.equal(rows @ small.t(), rows @ numbers.t()) and torch.equal(small.unflatten(0, (2, 3))[1], numbers[3:])
    assert torch.equal(small[2], numbers[2]) and torch.equal(small.float(), numbers.float())


def test_casts_to_its_own_dtype_and_choices_of_matrices_stay_small():
    small = eight_bit(torch.randn(3, 4, 5), "int8", torch.bfloat16)
    parts = [small.detach(), small.to(torch.bfloat16), small[0], *small, torch.nn.Parameter(small, requires_grad=False)]
    assert all(isinstance(part, EightBit) for part in parts)
    assert not isinstance(small.to(torch.float32), EightBit) and not isinstance(small[0][0], EightBit)


# --- a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(model):
    """The small model with its loud weights, as it is served."""

    def made(kind: str | None, numerics=BF16()):  # noqa: B008 - frozen
        copy = model.spec.build(numerics)
        copy.load_state_dict(model.state_dict())
        return lower_weights(copy.eval(), kind)

    return made


def off(got: Tensor, want: Tensor) -> float:
    """Relative, in the mean square over logits without their mean."""
    return ((got - want).square().mean() / want.var()).sqrt().item()


@pytest.mark.parametrize(("kind", "bound"), [("fp8", 0.12), ("int8", 0.03)])
def test_logits_are_close_to_those_of_bf16(kind, bound, served):
    """Beside bf16's own distance from fp32 as a scale; likeliest tokens agree where they are clear."""
    tokens_T = random_tokens(60, vocab=VOCAB)
    full, half, small = (forward(served(*how), tokens_T, [60]) for how in ((None, FP32()), (None,), (kind,)))
    assert 0 < off(half, full) < 0.05
    assert 0 < off(small, half) < bound
    gap = half.topk(2).values
    clear_T = gap[:, 0] - gap[:, 1] > 3 * (small - half).std()
    assert clear_T.sum() > 5
    assert torch.equal(small.argmax(-1)[clear_T], half.argmax(-1)[clear_T])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_follows_the_prompt(kind, served):
    model, tokens_T = served(kind, FP32()), random_tokens(24, vocab=VOCAB)
    whole, steps = forward(model, tokens_T, [24]), chunked(model, tokens_T, [7] + [1] * 17)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_matrices_alone_are_small_and_no_state_changes(kind, served):
    model, plain = served(kind), served(None)
    small = {name for name, parameter in model.named_parameters() if isinstance(parameter, EightBit)}
    assert small == hidden_matrices(model) and len(small) == 20
    rest = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert name in small or (torch.equal(rest[name], parameter) and rest[name].dtype == parameter.dtype)
    states = [(one.memory(1).layers[0].k.dtype, one.memory(1).nbytes) for one in (model, plain)]
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted(kind, served, tokenizer):
    model, plain = served(kind), served(None)
    named = dict(plain.named_parameters())
    hidden = sum(named[name].numel() for name in hidden_matrices(plain))
    saved = Weights.of(plain).held_bytes - Weights.of(model).held_bytes
    scales = sum(p.scaled.scale.nbytes for p in model.parameters() if isinstance(p, EightBit))
    assert saved == hidden - scales
    assert Weights.of(plain).count == Weights.of(model).count == sum(p.numel() for p in named.values())
    assert Weights.of(plain).held_bytes == sum(parameter.nbytes for parameter in named.values())
    generator = Generator(model, tokenizer)
    generator.generate(["the cat"], Sampling(max_tokens=2, temperature=0))
    assert generator.stats.weights == Weights.of(model)


def test_of_a_stack_only_experts_that_are_met_are_restored(monkeypatch, served):
    model, restored = served("int8"), []
    plain = EightBit.numbers
    monkeypatch.setattr(EightBit, "numbers", lambda self: restored.append(self.shape) or plain(self))
    forward(model, random_tokens(1, vocab=VOCAB), [1])
    assert restored and all(len(shape) == 2 for shape in restored)


# --- loading --------------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    return frame.run(get_command(app), ["generate", *words, "--prompt", "the", "--device", "cpu"], False)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_small_weights(kind, run_folder, capsys):
    assert any(isinstance(parameter, EightBit) for parameter in load(run_folder, weights=kind)[0].parameters())
    assert command(str(run_folder), "--weights", kind, "--max-tokens", "3", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["new_tokens"] == 3
    each = float(said.err.split("weights ")[1].split(", ")[1].split(" bytes")[0])
    assert 1.0 < each < 2.5  # embedding and head stay fp32


def test_other_weights_are_refused(run_folder, capsys):
    assert command(str(run_folder), "--weights", "int4") == 2
    assert "--weights (got int4, expected fp8 or int8)" in capsys.readouterr().err
