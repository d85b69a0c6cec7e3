"""Rows as a person reads them: decoded, with document borders, and marks on tokens that carry no loss."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from sextant.data.loader import IGNORE, Loader, Row
from sextant.data.tokenizer import StreamDecoder, Tokenizer

BORDER = "──── document ────"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def show(loader: Loader, samples: int, console: Console) -> None:
    """Print the first ``samples`` rows of a loader."""
    colour = console.is_terminal and not console.no_color
    mark = "dim" if colour else "⟦brackets⟧"
    legend = f"Tokens in {mark} carry no loss: nothing before them in their row predicts them."
    console.print(legend, style="bold", soft_wrap=True)
    for sample in range(samples):
        row = loader.row(sample)
        console.print(heading(sample, row), style="bold", soft_wrap=True, highlight=False)
        console.print(body(row, loader.shards.tokenizer, colour), soft_wrap=True, highlight=False)


def heading(sample: int, row: Row) -> str:
    """``sample 3: 128 tokens, 2 documents, 125 predicted, 0 padding``."""
    documents, predicted = int(row.starts_T[: row.used].sum()), int((row.targets_T != IGNORE).sum())
    padding = len(row.tokens_T) - row.used
    named = "1 document" if documents == 1 else f"{documents} documents"
    return f"\nsample {sample}: {row.used} tokens, {named}, {predicted} predicted, {padding} padding"


def body(row: Row, tokenizer: Tokenizer, colour: bool) -> Text:
    """The row's text; where a document begins inside it, a border on its own line."""
    text = Text()
    for piece, loss, border in runs(row, tokenizer):
        if border:
            text.append(f"\n{BORDER}\n", style="cyan" if colour else "")
        visible = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", piece)
        text.append(visible if loss or colour else f"⟦{visible}⟧", style="" if loss or not colour else "dim")
    return text


def runs(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Stretches of text that are alike: text, whether it carries loss, whether a document begins before it.

    A character whose bytes lie in two stretches belongs to the second.
    """
    carries = [False, *(row.targets_T[:-1] != IGNORE).tolist()]
    borders = [False, *row.starts_T[1:].tolist()]
    decoder = StreamDecoder(tokenizer)
    text, loss, border = "", carries[0], False
    for index in range(row.used):
        if carries[index] != loss or borders[index]:
            if text:
                yield text, loss, border
            text, loss, border = "", carries[index], borders[index]
        text += decoder.feed([int(row.tokens_T[index])])
    yield text + decoder.finish(), loss, border
