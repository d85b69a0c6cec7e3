"""``sextant data``: prepare a corpus, and look at what a model will be shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from sextant.data.dataset import Index

app = verb(help="Prepare a corpus, and look at what a model will be shown.", no_args_is_help=True)


@app.command()
def prepare(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or folders of text.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    vocab: Annotated[str | None, typer.Option(help="Ids of the tokenizer to train, such as 8k; default 4096.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use instead.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of bytes to hold out.")] = 0.05,
    text_field: Annotated[str, typer.Option(help="Field of a row that holds the text.")] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave up to 0.1 % bad rows out; list them.")] = False,
    encoding_errors: Annotated[str, typer.Option(help="strict, or replace bytes that are no UTF-8.")] = "strict",
    max_line_mb: Annotated[int, typer.Option(help="Longest line or text file, MiB.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Chooses the documents to hold out.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Encode text files into a folder that `sextant train --data` reads."""
    from sextant.core.errors import UsageError
    from sextant.core.fs import json_text
    from sextant.core.units import parse_size
    from sextant.data import prepare as preparation
    from sextant.data.corpus import Reading
    from sextant.data.tokenizer import Tokenizer

    if vocab and tokenizer:
        raise UsageError("--vocab and --tokenizer exclude each other", fix="A given tokenizer brings its vocabulary")
    reading = Reading(text_field, skip_bad, encoding_errors, max_line_mb)  # type: ignore[arg-type]
    index = preparation.prepare(
        paths, out, vocab=parse_size(vocab or "4096"), tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        heldout=heldout, seed=seed, reading=reading, quiet=quiet,
    )
    if as_json:
        typer.echo(json_text({"folder": str(out), **index.to_dict()}), nl=False)
    else:
        _table(index, out)


def _table(index: Index, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from sextant.core import units

    table = Table("split", "documents", "tokens", "bytes", "shards", title=f"{out}: vocabulary {index.vocab:,}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in index.splits.items():
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", units.size(split.bytes), str(split.shards))
    console = Console()
    console.print(table)
    console.print(
        f"{index.tokens_per_byte:.3f} tokens per byte, {index.duplicates:,} duplicates kept, {index.empty:,} empty "
        f"documents dropped, {index.bad_rows:,} bad rows left out, "
        f"{index.passed_over:,} files of other kinds passed over",
        highlight=False, soft_wrap=True,
    )
    for line in index.bad:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_books", help="A prepared folder, or books.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Rows to show.")] = 3,
    seq_len: Annotated[str, typer.Option(help="Tokens per row, such as 128 or 8k.")] = "128",
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    packing: Annotated[str, typer.Option(help="concat or best_fit.")] = "concat",
    seed: Annotated[int, typer.Option(help="Order of documents and rows.")] = 0,
) -> None:
    """Decoded rows with document borders and the tokens that carry no loss."""
    from rich.console import Console

    from sextant.core.errors import UsageError
    from sextant.core.units import parse_size
    from sextant.data.dataset import SPLITS
    from sextant.data.inspect import show
    from sextant.data.loader import Loader
    from sextant.data.prepare import opened
    from sextant.data.spec import Data

    if split not in SPLITS:
        raise UsageError("no such split", where="--split", got=split, expected=" or ".join(SPLITS))
    data = Data.parse({"source": source, "seq_len": parse_size(seq_len), "packing": packing, "seed": seed})
    shards = opened(data)[SPLITS.index(split)]
    show(Loader(shards, data), n, Console())  # type: ignore[arg-type]
