"""The sampling flags, the same for every verb that writes text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sextant.data.tokenizer import Tokenizer
    from sextant.model.transformer import Transformer
    from sextant.serve.sampling import Sampling
    from sextant.train.run import Run

Path_ = Annotated[str, typer.Argument(metavar="PATH", help="Run folder, or one checkpoint folder step-XXXXXXXX in it.")]
MaxTokens = Annotated[str, typer.Option(help="New tokens at most, such as 200 or 1k.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; up to 2.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="The fewest likeliest tokens that reach this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Tokens at least this fraction as likely as the likeliest; 0 is off.")]
Seed = Annotated[int | None, typer.Option(help="Makes the answer repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="The text ends before this string; up to 16 of them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")]
Weights = Annotated[str | None, typer.Option(help="fp8 or int8: hold hidden matrices in 8 bits; less memory, slower.")]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16; the run's own when left out.")]


def sampling_of(
    max_tokens: str, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None,
    stop: list[str] | None,
) -> Sampling:
    """The declaration that the flags make.

    Raises:
        UsageError: a value out of range, named by its flag.
    """
    from sextant.core.units import parse_size
    from sextant.serve.sampling import Sampling

    return Sampling.parse({
        "max_tokens": parse_size(max_tokens), "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "seed": seed, "stop": tuple(stop or ()),
    }, source="sampling")


def loaded(
    path: str, device: str, dtype: str | None, weights: str | None = None
) -> tuple[Transformer, Tokenizer, Run]:
    """A trained model where it should run.

    Raises:
        UsageError: no such dtype, or no such way to hold weights.
        CheckpointError: nothing to load.
        EnvironmentFault: no such device.
    """
    from typing import get_args

    from sextant.axes.numerics import TABLE, EightBitKind
    from sextant.cli.runs import pick_device
    from sextant.core.errors import UsageError, nearest
    from sextant.model.checks import notes
    from sextant.serve.generate import load

    kinds = {row.name: row.spec for row in TABLE}
    if dtype is not None and dtype not in kinds:
        raise UsageError("no such dtype", where="--dtype", got=dtype, fix=nearest(dtype, kinds))
    small = get_args(EightBitKind)
    if weights is not None and weights not in small:
        raise UsageError("no such weights", where="--weights", got=weights, expected=" or ".join(small))
    numerics = kinds[dtype]() if dtype else None
    model, tokenizer, run = load(path, pick_device(device), numerics, weights)  # type: ignore[arg-type]
    for line in notes(model.spec):
        typer.echo(f"note: {line}", err=True)
    return model, tokenizer, run
