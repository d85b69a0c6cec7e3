"""``sextant demo``: the main job in about two minutes: train the twin of MAI-Base-1 on the books, then let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sextant.cli.frame import verb

app = verb()

PROMPT = "ROMEO.\n"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[str | None, typer.Option(help="Optimiser steps; the default takes about two minutes.")] = None,
) -> None:
    """Train the CPU twin of MAI-Base-1 on the bundled books, then let it write."""
    from sextant import recipes
    from sextant.cli.train import run_training
    from sextant.core.settings import Setting
    from sextant.serve.generate import Generator, load
    from sextant.serve.sampling import Sampling

    run = recipes.get("mai-base-1").twin().replace(prompt=PROMPT)
    if steps is not None:
        run, _ = run.with_settings([Setting("steps", steps, "--steps")])
    result = run_training(run, out, "cpu")
    model, tokenizer, _ = load(out)
    text = "".join(Generator(model, tokenizer).stream(PROMPT, Sampling(temperature=0.7, max_tokens=120, seed=0)))
    typer.echo(f"\n{PROMPT}{text}\n")
    typer.echo(f"held out: {result.bpb:.3f} bits per byte on {result.bytes:,} bytes it never saw")
    typer.echo(f"pictures: {out / 'plots'}/loss.png, load.png, lr.png; numbers beside them as CSV")
    typer.echo(f"go on:    sextant chat {out}  |  sextant show mai-base-1  |  sextant train mixtral-8x7b")
