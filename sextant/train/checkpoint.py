"""Checkpoints: folders of safetensors with a manifest, that are either whole or not there.

``step-00000300/`` holds one safetensors file for each part (``model``, ``optimizer``, ``rng``, ...), ``state.json`` and
last of all ``manifest.json`` with the size and SHA-256 of every file, its own digest, and for every tensor its global
shape and the index range that each file holds. Tensors are addressed by name and index range, never by rank.

Promises, held by kill tests: a step is acknowledged when :func:`save` returns; from then on some acknowledged step
loads at every instant; nothing that fails verification is ever loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sextant.core import fs, tensorfile
from sextant.core.errors import CheckpointError, SextantError, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"

_STEP = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"[a-z][a-z0-9_]*")
_LEFTOVERS = (".tmp-", ".dead-", ".was-")
_MUST_AGREE = ("recipe", "tokenizer")
_CHANGES_BITS = ("threads", "torch", "device", "world_size", "python")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        parts: tensors by part and name, on the device that was asked for.
        state: what the caller saved as plain data: loader position, schedule, spike window, ...
        manifest: the verified manifest; ``manifest["identity"]`` says what it belongs to.
        path: the folder.
        step: optimiser steps done.
        notes: lines worth printing, such as files that were ignored.
    """

    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: dict[str, Any]
    path: Path
    step: int
    notes: tuple[str, ...] = ()


# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    intact: int | None = None,
) -> Path:
    """Write ``root/step-XXXXXXXX`` and return it; when this returns, the step survives a kill and a power cut.

    Args:
        root: the folder of all checkpoints of one run; created when missing.
        step: optimiser steps done. A step that exists is replaced, and stays recoverable at every instant.
        parts: tensors by part (``model``, ``optimizer``, ...) and name; tied tensors once, under one name.
        state: plain data for ``state.json``.
        identity: what the checkpoint belongs to: ``recipe``, ``tokenizer`` (digest), ``config`` (digest), ``threads``,
            ``torch``, ``device``, ... (see :func:`require_compatible`).
        intact: the step to fall back on, for the error line; the newest existing one when None.

    Raises:
        EnvironmentFault: disk full, I/O error, no permission; the fault names the step that is intact.
        CheckpointError: a name, dtype or alias that cannot be saved.
    """
    final, aside = root / _folder(step), root / f".tmp-{_folder(step)}-{getpid()}"
    need = sum(tensor.numel() * tensor.element_size() for tensors in parts.values() for tensor in tensors.values())
    with fs.guard(f"writing step {step}", root, need, _fallback(root, step, intact)):
        fs.make_folder(root)
        fs.new_folder(aside)
        try:
            _write(aside, step, parts, state, identity)
            _publish(aside, final)
        except BaseException:
            with suppress(SextantError, OSError):  # the first fault is the one to report; leftovers are tidied later
                fs.remove_tree_safely(aside)
            raise
    return final


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _fallback(root: Path, step: int, intact: int | None) -> str:
    older = [other for other in steps(root) if other != step]
    if intact is None and older:
        intact = older[-1]
    return f"step {intact} is intact" if intact is not None else "no older step exists"


def _write(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    files: dict[str, dict[str, Any]] = {}
    for part, tensors in parts.items():
        if not _PART.fullmatch(part):
            raise CheckpointError("part name refused", got=ascii(part), expected="lower-case letters")
        files[_file(part)] = _file_record(fs.write_stream(folder / _file(part), tensorfile.chunks(tensors)))
    files[STATE] = _file_record(fs.write_stream(folder / STATE, [fs.json_text(dict(state)).encode()]))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "identity": {field: value for field, value in identity.items() if field != "tensors"},
        "files": files,
        "tensors": {part: _tensor_records(part, tensors) for part, tensors in parts.items()},
    }
    fs.write_stream(folder / MANIFEST, [_render(manifest)])


def _file(part: str) -> str:
    return f"{part}.safetensors"


def _file_record(written: fs.Written) -> dict[str, Any]:
    return {"bytes": written.bytes, "sha256": written.sha256}


def _tensor_records(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": tensorfile.dtype_code(tensor),
            "shape": list(tensor.shape),
            "shards": [{"file": _file(part), "range": [[0, length] for length in tensor.shape]}],
        }
        for name, tensor in tensors.items()
    }


def _render(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes, ending with a digest of everything before it."""
    digest = hashlib.sha256(fs.json_text(manifest).encode()).hexdigest()
    return fs.json_text({**manifest, "digest": digest}).encode()


def _publish(aside: Path, final: Path) -> None:
    """Name the finished folder; a folder of the same step steps aside under a name that :func:`tidy` can restore."""
    was = final.with_name(f".was-{final.name}")
    if final.exists():
        if was.exists():
            fs.remove_tree_safely(was)
        fs.rename(final, was)
    try:
        fs.publish(aside, final)
    except BaseException:
        if was.exists() and not final.exists():
            fs.rename(was, final)
        raise
    if was.exists():
        fs.remove_tree_safely(was)


# --- verifying and loading ------------------------------------------------------------------------------------------


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file's size and hash agreed with it.

    Raises:
        CheckpointError: what differs, with got, expected and what to do.
    """
    if not path.is_dir():
        raise _not_a_folder(path)
    manifest = _read_manifest(path)
    for name, record in manifest["files"].items():
        _verify_file(path / name, record)
    return manifest


def _not_a_folder(path: Path) -> CheckpointError:
    if path.is_file():
        tensorfile.refuse_pickle(path)
        return CheckpointError("not a checkpoint", where=path, got="a file", expected="a folder named step-XXXXXXXX")
    return CheckpointError("no such checkpoint", where=path)


def _read_manifest(path: Path) -> dict[str, Any]:
    where = path / MANIFEST
    if not where.is_file():
        for other in sorted(path.iterdir()):
            if other.is_file():
                tensorfile.refuse_pickle(other)
        raise CheckpointError("not a checkpoint", where=path, got=f"no {MANIFEST}", fix=_advice(path))
    try:
        raw = where.read_bytes()
    except OSError as error:
        raise CheckpointError("cannot read", where=where, got=error.strerror or error) from None
    manifest = _parse_manifest(raw, where)
    named = _STEP.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise CheckpointError("folder and manifest name different steps", where=path, got=manifest["step"])
    return manifest


def _parse_manifest(raw: bytes, where: Path) -> dict[str, Any]:
    try:
        manifest = tensorfile.strict_json(raw, where)
    except CheckpointError as error:
        raise CheckpointError(
            f"damaged manifest ({error.what})", where=where, got=error.got, fix=_advice(where.parent)
        ) from None
    if isinstance(manifest, dict) and manifest.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        got = manifest["schema_version"]
        raise CheckpointError("unknown manifest version", where=where, got=got, expected=SCHEMA_VERSION)
    if not isinstance(manifest, dict) or not manifest.pop("digest", None) or _render(manifest) != raw:
        raise CheckpointError(
            "damaged manifest", where=where, got="a digest that does not fit", fix=_advice(where.parent)
        )
    _check_manifest(manifest, where)
    return manifest


def _check_manifest(manifest: dict[str, Any], where: Path) -> None:
    """A digest proves that nothing changed since it was written, not that this program wrote it."""
    files, tensors = manifest.get("files"), manifest.get("tensors")
    known = {_file(part) for part in tensors if _PART.fullmatch(part)} if isinstance(tensors, dict) else set()
    sound = (
        isinstance(manifest.get("step"), int)
        and isinstance(manifest.get("identity"), dict)
        and isinstance(files, dict)
        and isinstance(tensors, dict)
        and all(isinstance(records, dict) for records in tensors.values())
        and set(files) == known | {STATE}
        and all(isinstance(file, dict) and {"bytes", "sha256"} <= set(file) for file in files.values())
    )
    if not sound:
        raise CheckpointError("not a manifest of this program", where=where)


def _verify_file(path: Path, record: Mapping[str, Any]) -> None:
    where, advice = f"{path.parent.name}/{path.name}", _advice(path.parent)
    try:
        got = path.stat().st_size
        if got != record["bytes"]:
            expected = f"{record['bytes']:,} bytes by its manifest"
            raise CheckpointError("wrong size", where=where, got=f"{got:,} bytes", expected=expected, fix=advice)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        missing = "missing file" if isinstance(error, FileNotFoundError) else f"cannot read ({error.strerror})"
        raise CheckpointError(missing, where=where, fix=advice) from None
    if digest != record["sha256"]:
        got, expected = f"sha256 {digest[:12]}", record["sha256"][:12]
        raise CheckpointError("changed since it was written", where=where, got=got, expected=expected, fix=advice)


def _advice(path: Path) -> str:
    """What to do about a folder that does not load. Only one that bears a step's name is ours to delete."""
    named = _STEP.fullmatch(path.name)
    if not named:
        return "Name a run folder, which holds checkpoints/, or a folder step-XXXXXXXX in there"
    others = [step for step in steps(path.parent) if step < int(named[1])]
    if others:
        return f"Delete the folder or resume from {_folder(others[-1])}"
    return "Delete the folder; no older step exists here"


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Verify a checkpoint folder and read it.

    Raises:
        CheckpointError: damaged, not ours, refused names or counts, a pickle file, NaN or infinity anywhere.
    """
    manifest = verify(path)
    parts = {part: _read_part(path, part, records, device) for part, records in manifest["tensors"].items()}
    for part, tensors in parts.items():
        bad = tensorfile.first_non_finite(tensors)
        if bad is not None:
            raise CheckpointError(f"NaN or infinity in the {part}", where=f"{path.name}/{bad}", fix=_advice(path))
    state = tensorfile.strict_json((path / STATE).read_bytes(), path / STATE)
    return Checkpoint(parts, state, manifest, path, manifest["step"], _extras(path, manifest))


def _read_part(path: Path, part: str, records: Any, device: torch.device | str) -> dict[str, Tensor]:
    tensors = tensorfile.read(path / _file(part), device)
    if _tensor_records(part, tensors) != records:
        _require_same(records, _tensor_records(part, tensors), f"{path.name}/{_file(part)}")
    return {name: tensors[name] for name in records}


def _require_same(expected: Mapping[str, Any], got: Mapping[str, Any], where: str) -> None:
    for name in sorted(set(expected) | set(got)):
        if expected.get(name) != got.get(name):
            raise CheckpointError(
                f"tensor '{name}' differs from the manifest",
                where=where,
                got=got.get(name),
                expected=expected.get(name),
            )


def _extras(path: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    known = {MANIFEST, *manifest["files"]}
    extra = sorted(item.name for item in path.iterdir() if item.name not in known)
    return tuple(f"ignored {path.name}/{name}: not in the manifest" for name in extra)


# --- the folder of checkpoints --------------------------------------------------------------------------------------


def steps(root: Path) -> list[int]:
    """Steps that have a folder, oldest first: by number, never by file times, and by full name only."""
    if not root.is_dir():
        return []
    found = [(entry, match) for entry in root.iterdir() if (match := _STEP.fullmatch(entry.name))]
    return sorted(int(match[1]) for entry, match in found if entry.name == _folder(int(match[1])) and entry.is_dir())


def tidy(root: Path) -> list[str]:
    """Remove what a killed save or delete left, and say so. Only for the process that holds the run folder's lock.

    Raises:
        EnvironmentFault: the leftovers cannot be removed.
    """
    lines = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        original = root / path.name.removeprefix(".was-")
        if path.name.startswith(".was-") and not original.exists():
            fs.rename(path, original)
            fs.sync_folder(root)
            lines.append(f"restored {original.name}: its replacement was not finished")
        elif path.name.startswith(_LEFTOVERS):
            fs.remove_tree_safely(path)
            lines.append(f"removed {path.name}: left by an unfinished save or delete")
    return lines


def search(root: Path, device: torch.device | str = "cpu") -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that loads, and a line for each newer one that does not. Changes nothing on disk.

    Returns:
        None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and none loads; starting afresh would hide the loss.
    """
    lines: list[str] = []
    fault: CheckpointError | None = None
    for step in reversed(steps(root)):
        try:
            found = load(root / _folder(step), device)
        except CheckpointError as error:
            fault = fault or error
            lines.append(f"skipped step {step}: {error.line()}")
            continue
        return found, [*lines, *found.notes]
    if fault is not None:
        raise fault
    return None, lines


def newest(root: Path, device: torch.device | str = "cpu") -> tuple[Checkpoint | None, list[str]]:
    """:func:`tidy`, then :func:`search`: what a resuming run starts from, and the lines it should print."""
    tidied = tidy(root)
    found, lines = search(root, device)
    return found, [*tidied, *lines]


def retain(root: Path, keep: int, permanent_every: int | None = None) -> list[Path]:
    """Delete all but the newest ``keep`` steps and the multiples of ``permanent_every``; returns what is gone.

    Nothing is deleted before the newest step has been read back and its hashes agree.

    Raises:
        UsageError: ``keep`` below 2: the newest step could be the one that a later fault damages.
        CheckpointError: the newest step does not verify; everything is kept.
    """
    if keep < 2:
        raise UsageError("too few checkpoints kept", where="keep", got=keep, expected="2 or more")
    old = [step for step in steps(root)[:-keep] if not permanent_every or step % permanent_every]
    if not old:
        return []
    verify(root / _folder(steps(root)[-1]))
    return _remove(root, old)


def discard_after(root: Path, step: int) -> list[Path]:
    """Delete the steps after ``step``: a run that deliberately goes back must not find them later as the newest."""
    return _remove(root, [later for later in steps(root) if later > step])


def _remove(root: Path, old: list[int]) -> list[Path]:
    gone = [root / _folder(step) for step in old]
    for path in gone:
        fs.remove_tree_safely(path)
    return gone


# --- does it fit? ---------------------------------------------------------------------------------------------------


def require_compatible(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Lines about what differs but may; an error about what must not.

    Args:
        manifest: of the checkpoint.
        identity: of the run that wants to resume, with the keys that :func:`save` was given. Its ``tensors``, shapes
            by name, are compared with those of the part ``model``.

    Raises:
        CheckpointError: ``recipe``, ``tensors`` or ``tokenizer`` differ; the first of them is named.
    """
    saved, where = manifest["identity"], f"step {manifest['step']}"
    for field in _MUST_AGREE:
        if field in identity and field in saved and saved[field] != identity[field]:
            raise CheckpointError(
                f"checkpoint has another {field}",
                where=where,
                got=_short(saved[field]),
                expected=_short(identity[field]),
                fix="Resume with what wrote it, or start a new run",
            )
    if "tensors" in identity:
        shapes = {name: record["shape"] for name, record in manifest["tensors"].get("model", {}).items()}
        _require_shapes(shapes, identity["tensors"], where)
    return [*_unknown(saved, identity), *_changes(saved, identity, where)]


def _short(value: object) -> str:
    """A digest by its first 12 characters, a name whole."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _unknown(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    return [
        f"checkpoint does not record its {field}" for field in _MUST_AGREE if field in identity and field not in saved
    ]


def _changes(saved: Mapping[str, Any], identity: Mapping[str, Any], where: str) -> list[str]:
    changed = {field for field in saved if field in identity and saved[field] != identity[field]}
    lines = [
        f"bitwise resume not guaranteed: {field} {saved[field]} -> {identity[field]}"
        for field in _CHANGES_BITS
        if field in changed
    ]
    return lines + [f"configuration changed since {where}"] * ("config" in changed)


def require_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """The names and shapes that a model needs are the ones at hand.

    Args:
        got: tensors of a checkpoint part.
        expected: the model's own, by name (meta tensors will do).
        where: what ``got`` is, for the error line.

    Raises:
        CheckpointError: lists the first 5 of the missing, unexpected and wrongly shaped tensors.
    """
    _require_shapes(
        {name: list(tensor.shape) for name, tensor in got.items()},
        {name: list(tensor.shape) for name, tensor in expected.items()},
        where,
    )


def _require_shapes(got: Mapping[str, list[int]], expected: Mapping[str, list[int]], where: str) -> None:
    wrong = [
        f"{name} got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(set(got) | set(expected))
        if got.get(name) != expected.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError("tensors do not fit the model", where=f"{where}: {'; '.join(wrong[:5])}{more}")
