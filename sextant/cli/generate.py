"""``sextant generate``: continue a prompt. The text goes to stdout as it comes, numbers go to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sextant.cli.frame import verb
from sextant.cli.sampling import (
    Device,
    Dtype,
    MaxTokens,
    MinP,
    Path_,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Weights,
    loaded,
    sampling_of,
)

if TYPE_CHECKING:
    from sextant.serve.generate import Generator, Stats
    from sextant.serve.sampling import Sampling

app = verb()


@app.command()
def generate(
    path: Path_,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; may be empty.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with the text to continue.")] = None,
    n: Annotated[int, typer.Option("--n", help="How many answers.", min=1, max=64)] = 1,
    max_tokens: MaxTokens = "200",
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Continue a prompt with a trained model."""
    sampling = sampling_of(max_tokens, temperature, top_k, top_p, min_p, seed, stop)
    text = _prompt(prompt, prompt_file)
    model, tokenizer, _ = loaded(path, device, dtype, weights)
    from sextant.serve.generate import Generator

    generator = Generator(model, tokenizer)
    if as_json:
        _print_json(generator, text, sampling, n)
    elif n == 1:
        _stream(generator, text, sampling)
    else:
        _print_all(generator, text, sampling, n)
    if not quiet:
        typer.echo(stats_line(generator.stats), err=True)


def _prompt(prompt: str | None, file: Path | None) -> str:
    from sextant.core.errors import DataError, UsageError

    if (prompt is None) == (file is None):
        raise UsageError("give either --prompt or --prompt-file")
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=file, got=f"byte {error.start}") from None
    except OSError as error:
        raise UsageError("cannot read", where=file, got=error.strerror or error) from None


def _stream(generator: Generator, text: str, sampling: Sampling) -> None:
    for piece in generator.stream(text, sampling):
        print(piece, end="", flush=True)
    print(flush=True)


def _print_all(generator: Generator, text: str, sampling: Sampling, n: int) -> None:
    for number, result in enumerate(generator.generate([text], sampling, n), start=1):
        print(f"--- {number} of {n} ({result.finish_reason})\n{result.text}")


def _print_json(generator: Generator, text: str, sampling: Sampling, n: int) -> None:
    import json

    for result in generator.generate([text], sampling, n):
        print(json.dumps({
            "text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens, "new_tokens": len(result.tokens), "seed": result.seed,
            "tokens_per_second": round(generator.stats.tokens_per_second, 1),
            "weight_bytes": generator.stats.weights.held_bytes,
        }))


def stats_line(stats: Stats) -> str:
    """``31 prompt tokens | 200 new | 412.0 tok/s | state 96.0 KiB | weights 7.3 MiB, 4.00 bytes each``."""
    from sextant.core.units import size

    return (
        f"{stats.prompt_tokens} prompt tokens | {stats.new_tokens} new | {stats.tokens_per_second:.1f} tok/s"
        f" | state {size(stats.state_bytes)}"
        f" | weights {size(stats.weights.held_bytes)}, {stats.weights.bytes_each:.2f} bytes each"
    )
