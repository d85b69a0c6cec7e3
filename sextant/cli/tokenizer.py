"""``sextant tokenizer``: train one, or look at one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from sextant.data.tokenizer import Tokenizer

app = verb(help="Train a tokenizer, or look at one.", no_args_is_help=True)


@app.command()
def train(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or folders of text.")],
    vocab: Annotated[str, typer.Option(help="Ids, such as 4096 or 32k.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="tokenizer.json to write.")],
    text_field: Annotated[str, typer.Option(help="Field of a row that holds the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train byte-level BPE on all documents; the same files give the same tokenizer."""
    from sextant.core import fs
    from sextant.core.units import parse_size
    from sextant.data.corpus import Corpus, Reading
    from sextant.data.progress import Progress
    from sextant.data.tokenizer import Tokenizer

    size = parse_size(vocab)
    with Progress("training the tokenizer", quiet=quiet) as progress:
        texts = (document.text for document in progress.over(Corpus(paths, Reading(text_field))))
        tokenizer = Tokenizer.train(texts, size)
    fs.make_folder(out.parent)
    fs.write_text(out, tokenizer.to_json())
    if as_json:
        typer.echo(fs.json_text({"file": str(out), **_facts(tokenizer)}), nl=False)
    else:
        typer.echo(f"{out}: {tokenizer.vocab_size:,} ids, digest {tokenizer.digest[:12]}")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A tokenizer.json, or a folder that has one.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Text to encode.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """What a tokenizer is, and how it cuts a text."""
    from sextant.core.fs import json_text
    from sextant.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(file)
    facts = _facts(tokenizer)
    if text is not None:
        ids = tokenizer.encode(text)
        facts |= {"ids": ids, "tokens": [tokenizer.token(i) for i in ids], "bytes": len(text.encode())}
    if as_json:
        typer.echo(json_text(facts), nl=False)
        return
    for name, value in facts.items():
        typer.echo(f"{name:<16} {value if not isinstance(value, list) else ' '.join(map(str, value))}")


def _facts(tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "vocab": tokenizer.vocab_size, "end_of_text": f"{tokenizer.eot} (id {tokenizer.eot_id})",
        "byte_level": tokenizer.byte_level, "control_tokens": len(tokenizer.special_ids), "digest": tokenizer.digest,
    }
