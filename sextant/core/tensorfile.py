"""Tensors in safetensors files: streamed out without a second copy in memory, read back with distrust.

The reference parser (the ``safetensors`` library) checks offsets and shapes. It accepts duplicate names, path-like
names and headers with hundreds of thousands of tensors; those are refused here, before it runs. Pickle and zip files
are never opened by anything that could execute them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sextant.core.errors import CheckpointError

MAX_TENSORS = 100_000
MAX_HEADER = 32 << 20

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,500}")
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


# --- writing --------------------------------------------------------------------------------------------------------


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: at most one tensor is copied, and only when it must be.

    Raises:
        CheckpointError: a name or dtype that the format or :func:`read` does not take, or two names for one memory.
    """
    refuse_aliases(tensors)
    # Widest elements first keeps every tensor aligned, as the format asks of writers.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    yield _header(ordered)
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(ordered: Iterable[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        check_name(name, "tensors to save")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": dtype_code(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dtype_code(tensor: Tensor) -> str:
    """``BF16`` and so on."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError("cannot be saved in safetensors", got=tensor.dtype, expected=", ".join(DTYPES.values()))
    return DTYPES[tensor.dtype]


def refuse_aliases(tensors: Mapping[str, Tensor]) -> None:
    """Tied tensors are saved once, under one name: loading two copies would untie them.

    Raises:
        CheckpointError: two names for the same memory.
    """
    seen: dict[tuple[torch.device, int, int], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        first = seen.setdefault(place, name) if place[2] else name
        if first != name:
            raise CheckpointError(f"'{first}' and '{name}' share memory", fix="Save tied tensors once, under one name")


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; on the CPU they are views of the mapped file until they are copied.

    Raises:
        CheckpointError: not a safetensors file, or one with names, counts or offsets that are refused.
    """
    read_header(path)
    with _refusals(path), safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_header(path: Path) -> dict[str, Any]:
    """The checked header: for each tensor its dtype, shape and data offsets.

    Raises:
        CheckpointError: as :func:`read`, found without reading data or trusting any length in the file.
    """
    refuse_pickle(path)
    raw = _header_bytes(path)
    # Counted before parsing, so that a crafted header cannot make the parser build millions of objects.
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b"[") > 2 * MAX_TENSORS:
        raise CheckpointError("too many tensors", where=path, expected=f"at most {MAX_TENSORS:,}")
    header = strict_json(raw, path)
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file", where=path, got="a header that is no object")
    header.pop("__metadata__", None)
    for name in header:
        check_name(name, path)
    with _refusals(path), safe_open(path, framework="pt"):
        return header


def _header_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
                got = f"a header of {length:,} bytes in a file of {path.stat().st_size:,}"
                raise CheckpointError("not a safetensors file", where=path, got=got)
            return file.read(length)
    except OSError as error:
        raise CheckpointError("cannot read", where=path, got=error.strerror or error) from None


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """The library's errors as ours, one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        text = str(error).splitlines()[0][:80]
        raise CheckpointError("damaged safetensors file", where=path, got=text) from None


def check_name(name: str, where: object) -> None:
    """Refuse names that could act as paths or terminal commands when a tool uses or prints them.

    Raises:
        CheckpointError: control characters, slashes, ``..``, or an empty or very long name.
    """
    if not _NAME.fullmatch(name) or name.startswith(".") or ".." in name or not name.isprintable():
        raise CheckpointError("tensor name refused", where=where, got=ascii(name[:60]), expected="letters and dots")


def refuse_pickle(path: Path) -> None:
    """Pickle (also inside zip) can run code when read, so it never is.

    Raises:
        CheckpointError: ``path`` is such a file by its first bytes or its ending.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError("cannot read", where=path, got=error.strerror or error) from None
    if start.startswith(_PICKLES) or path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path.name} is a pickle file, which can run code", where=path, fix="Ask for safetensors instead"
        )


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first floating tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _finite(tensor):
            return name
    return None


def _finite(tensor: Tensor) -> bool:
    values = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)
    # NaN and infinity survive a sum, which needs no second tensor; a sum that merely overflows is settled the slow way.
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())


def strict_json(raw: bytes, where: object) -> Any:
    """Plain data from JSON bytes; a key written twice is an error, because readers differ in which one they take.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, or a duplicate key.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError("key written twice", where=where, got=ascii(twice[:60]))
        return keys

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise CheckpointError("not UTF-8 text", where=where, got=f"byte {error.start}") from None
    except RecursionError:
        raise CheckpointError("JSON nested too deeply", where=where) from None
    except json.JSONDecodeError as error:
        raise CheckpointError("not valid JSON", where=f"{where}:{error.lineno}", got=error.msg) from None
    except ValueError as error:  # a number of thousands of digits
        raise CheckpointError("not valid JSON", where=where, got=str(error)[:60]) from None
