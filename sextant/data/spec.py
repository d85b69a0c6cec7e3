"""What a run trains on, as a declaration. Light to import: recipes need it without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from sextant.core.spec import Spec

BOOKS = "books"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Control tokens of a tokenizer that is trained here: the end of a document, and the two of ChatML."""

MIN_VOCAB = 256 + len(SPECIAL)
"""Every byte and the control tokens: the smallest byte-level vocabulary."""

MAX_VOCAB = 2**24
"""Far above any in use; beyond it the tokenizer library takes minutes, or ends the process."""


class Data(Spec):
    """Data of a run.

    Attributes:
        source: ``books`` (bundled), or the path of a folder made by ``sextant data prepare``.
        vocab: ids of the tokenizer that is trained on ``books``; a prepared folder brings its own.
        seq_len: tokens per row.
        packing: ``concat`` lays documents end to end and cuts; ``best_fit`` keeps them whole where they fit.
        mask_documents: documents in a row do not see each other, and nothing is predicted across their border.
        epochs: passes over the training split before data is used up; None for as many as the run needs.
        seed: order of documents and rows.
    """

    source: str = BOOKS
    vocab: int = Field(default=4096, ge=MIN_VOCAB, le=MAX_VOCAB)
    seq_len: int = Field(ge=1, le=2**24)
    packing: Literal["concat", "best_fit"] = "concat"
    mask_documents: bool = True
    epochs: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("source")
    @classmethod
    def _named(cls, source: str) -> str:
        if not source.strip():
            raise ValueError(f"needs '{BOOKS}' or the path of a prepared folder")
        return source
