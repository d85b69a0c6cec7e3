"""``sextant train``: the main job. From a recipe or a run file to a run folder; the same command goes on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from sextant.train.evaluate import HeldOut
    from sextant.train.run import Run

app = verb()


@app.command()
def train(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe's name, or a run file (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value, as often as needed.")] = None,
    size: Annotated[str, typer.Option(help="twin (two CPU cores) or paper.")] = "twin",
    steps: Annotated[str | None, typer.Option(help="Optimiser steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Tokens per sequence, such as 512 or 8k.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Sequences per step.")] = None,
    data: Annotated[str | None, typer.Option(help="A folder made by `sextant data prepare`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and dropout.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and their origins.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all that a start checks, then stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Train a recipe's twin or a run file; Ctrl-C saves, and the same command goes on."""
    from sextant.cli.runs import config_lines, resolve

    flags = {
        "--steps": ("steps", steps), "--lr": ("optimiser.lr", lr), "--seq-len": ("data.seq_len", seq_len),
        "--batch-size": ("batch.rows", batch_size), "--data": ("data.source", data), "--seed": ("seed", seed),
        "--dtype": ("numerics.kind", dtype),
    }
    run, origins = resolve(what, size, settings or [], flags)
    if print_config:
        for line in config_lines(run, origins):
            typer.echo(line)
        return
    if dry_run:
        _dry_run(run, device)
        return
    result = run_training(run, out, device, quiet)
    _print_result(run, result, as_json)


def run_training(run: Run, out: Path | None, device: str, quiet: bool = False) -> HeldOut:
    """Train in the run's folder and draw its plots, also when stopped early."""
    from sextant.cli.runs import pick_device
    from sextant.serve.generate import sampler
    from sextant.train.folder import RunFolder
    from sextant.train.loop import Trainer, run_name, to_stderr
    from sextant.train.plots import draw

    say = (lambda line: None) if quiet else to_stderr
    chosen = pick_device(device)
    with RunFolder(run_name(run, out)) as folder:
        for note in folder.notes:
            say(note)
        folder.write_command(sys.argv)
        trainer = Trainer(run, folder, chosen, say, sampler)
        say(f"{run.name} in {folder.path} on {chosen}, {trainer.parameters()}")
        try:
            result = trainer.fit()
        finally:
            try:
                draw(folder.path)
            except Exception as error:  # pictures must not hide how the training ended
                to_stderr(f"warning: no plots: {type(error).__name__}: {error}")
        say(f"next: sextant generate {shlex.quote(str(folder.path))} --prompt {shlex.quote(run.prompt.strip())}")
        return result


def _dry_run(run: Run, device: str) -> None:
    """Everything that a start checks, on a model without memory."""
    from sextant.cli.runs import pick_device
    from sextant.core import units
    from sextant.core.cost import At
    from sextant.data.loader import Loader
    from sextant.train.optim import train_only
    from sextant.train.start import begin_from, read_by

    pick_device(device)
    shards, _, tokenizer = read_by(run)
    Loader(shards, run.data).require(run.rows_from(0))
    model = run.model.build(run.numerics, device="meta")
    if run.train_only is not None:
        train_only(model, run.train_only)
    run.optimiser.build(model)
    if run.init_from is not None:
        begin_from(model, Path(run.init_from), tokenizer.digest, run.train_only)
    cost = run.model.training_cost(At(run.data.seq_len, run.numerics.itemsize))
    tokens = run.batch.rows * run.data.seq_len
    typer.echo(f"{run.name}: {units.count(cost.params)} parameters, {units.count(cost.active_params)} active")
    typer.echo(f"{run.steps} steps of {units.count(tokens)} tokens, {units.count(3 * cost.flops * tokens)} FLOPs each")


def _print_result(run: Run, result: HeldOut, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps({"name": run.name, "steps": run.steps, "loss": result.loss, "bpb": result.bpb}))
    else:
        typer.echo(f"{run.name}: {result.bpb:.4f} bits per byte on {result.tokens:,} held-out tokens")
