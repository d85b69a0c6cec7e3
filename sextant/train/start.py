"""Beginning a run: its data, and the weights of another in continued training, conversion, gates on a frozen base."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from sextant.core import units
from sextant.core.errors import CheckpointError
from sextant.data.dataset import Shards
from sextant.data.prepare import opened
from sextant.data.tokenizer import Tokenizer
from sextant.model.transformer import Transformer
from sextant.train import checkpoint
from sextant.train.checkpoint import Checkpoint
from sextant.train.run import Run, check_prompt, check_run, check_vocab


def read_by(run: Run) -> tuple[Shards, Shards, Tokenizer]:
    """Training split, held-out split and tokenizer, when all parts of the run fit together.

    Raises:
        UsageError: they do not.
        DataError: the data is not prepared, or changed since.
    """
    check_run(run)
    train, heldout, tokenizer = opened(run.data)
    check_vocab(run, tokenizer.vocab_size)
    check_prompt(run, len(tokenizer.encode(run.prompt)))
    return train, heldout, tokenizer


def begin_from(model: Transformer, source: Path, tokenizer: str, fresh: str | None = None) -> str:
    """Load the weights of a run folder or of one checkpoint, and say in one line what was loaded.

    The optimiser and the data start afresh. Names and shapes must be the model's own; only parameters that match the
    pattern ``fresh`` may be missing, because they are what is trained now: they keep the values drawn for them.

    Args:
        tokenizer: digest of the run's tokenizer: weights of another vocabulary mean other tokens.

    Raises:
        CheckpointError: no checkpoint there, another tokenizer, or tensors that do not fit; the first five are named.
    """
    found = _found(source)
    checkpoint.require_compatible({**found.manifest, "identity": _tokenizer(found)}, {"tokenizer": tokenizer})
    weights, own = found.parts["model"], model.state_dict()
    missing = [name for name in own if name not in weights and fresh is not None and fnmatchcase(name, fresh)]
    checkpoint.require_tensors({**weights, **{name: own[name] for name in missing}}, own, str(found.path))
    model.load_state_dict(weights, strict=not missing)
    fresh_count = _count({name: own[name] for name in missing})
    return f"begins with {_count(weights)} parameters of {found.path}; {fresh_count} start fresh"


def _found(source: Path) -> Checkpoint:
    if source.exists() and not (source / "checkpoints").is_dir():
        return checkpoint.load(source)  # one checkpoint, or what else it is: a pickle, a foreign folder
    found, _ = checkpoint.search(source / "checkpoints")
    if found is None:
        raise CheckpointError(
            "no weights to begin with", where=f"init_from {source}", got="no checkpoint",
            fix="Train that run first, or set init_from to a run folder or a checkpoint",
        )
    return found


def _tokenizer(found: Checkpoint) -> dict[str, object]:
    identity = found.manifest["identity"]
    return {"tokenizer": identity["tokenizer"]} if "tokenizer" in identity else {}


def _count(tensors: dict[str, Tensor]) -> str:
    return units.count(sum(tensor.numel() for tensor in tensors.values()))
