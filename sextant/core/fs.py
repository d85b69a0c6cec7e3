"""Durable files: the one place that writes into run and checkpoint folders.

A file or folder appears under its final name only when all its bytes are on the disk: it is written aside, synced,
renamed, and the folder that holds the name is synced. A reader sees the old state or the new one, never a part.

Every primitive step first passes :data:`hooks`, so that a test can kill the process or inject an ``OSError`` at any of
them. All failures of the machine leave here as :class:`EnvironmentFault` (exit 6), in one line.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sextant.core.errors import EnvironmentFault
from sextant.core.units import size

Hook = Callable[[str, Path], None]

hooks: list[Hook] = []
"""Called with the name and the path of each primitive step before it happens; may raise ``OSError``."""

_PIECE = 16 << 20  # bytes hashed and written at a time: small enough to stay in the cache between the two

_WORDS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file size limit reached",
    errno.EROFS: "read-only disk",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "disk error",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "a file is in the way",
    errno.EISDIR: "a folder is in the way",
}
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Written:
    """What reached the disk: bytes and SHA-256 (hex) of a file."""

    bytes: int
    sha256: str


# --- faults ---------------------------------------------------------------------------------------------------------


@contextmanager
def guard(task: str, folder: Path, need: int = 0, note: str = "") -> Iterator[None]:
    """Turn an ``OSError`` inside into an :class:`EnvironmentFault` that names ``task``.

    The outermost guard words the line, because it knows best what the user was waiting for.

    Args:
        task: such as ``writing step 300``.
        folder: where; its free space is reported when room ran out.
        need: bytes that the task needs, 0 when unknown.
        note: what is still safe, such as ``step 250 is intact``.
    """
    try:
        yield
    except (OSError, EnvironmentFault) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise _fault(cause, task, folder, need, note) from cause


def _fault(cause: OSError, task: str, folder: Path, need: int, note: str) -> EnvironmentFault:
    code = cause.errno or 0
    what = f"{_WORDS.get(code) or (cause.strerror or str(cause)).lower()} {task}"
    if code in _ROOM:
        facts = [f"need {size(need)}"] * bool(need) + [f"free {size(_free(folder))}"]
        what += f" ({', '.join(facts)})"
    if note:
        what += f"; {note}"
    return EnvironmentFault(what, fix=_cure(code, folder))


def _cure(code: int, folder: Path) -> str:
    if code in _ROOM:
        return f"Make room in {folder}, then run the same command again"
    if code == errno.EIO:
        return f"Check the disk that holds {folder}; nothing was kept of the failed write"
    return f"Look at {folder}, then run the same command again"


def _free(folder: Path) -> int:
    """Free bytes of the disk that holds ``folder`` or would hold it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


# --- primitive steps ------------------------------------------------------------------------------------------------


def _step(operation: str, path: Path) -> None:
    for hook in hooks:
        hook(operation, path)


def _open(path: Path, flags: int) -> int:
    _step("open", path)
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _write_all(fd: int, data: memoryview, path: Path) -> None:
    """Write every byte: one call may take only some of them."""
    while data:
        _step("write", path)
        data = data[os.write(fd, data) :]


def _fsync(fd: int, path: Path) -> None:
    _step("fsync", path)
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    _step("fsync-folder", folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Atomic within one disk; durable after :func:`sync_folder`."""
    _step("rename", target)
    os.rename(source, target)


def _mkdir(path: Path) -> None:
    _step("mkdir", path)
    os.mkdir(path)


def _unlink(path: Path) -> None:
    _step("unlink", path)
    os.unlink(path)


def _rmdir(path: Path) -> None:
    _step("rmdir", path)
    os.rmdir(path)


# --- files ----------------------------------------------------------------------------------------------------------


def write_stream(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Create ``path`` from ``chunks`` and sync it; for files inside a folder that :func:`publish` will name.

    Raises:
        EnvironmentFault: the machine refused; a part of the file may remain, and its folder must not be published.
    """
    digest, total = hashlib.sha256(), 0
    with guard(f"writing {path}", path.parent):
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for piece in _pieces(chunks):
                digest.update(piece)
                _write_all(fd, piece, path)
                total += len(piece)
            _fsync(fd, path)
        finally:
            os.close(fd)
    return Written(total, digest.hexdigest())


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _PIECE):
            yield view[start : start + _PIECE]


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file with these bytes, or leave it as it was.

    Raises:
        EnvironmentFault: the machine refused; the old file is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with guard(f"writing {path}", path.parent, need=len(data)):
        if aside.exists():
            _unlink(aside)
        try:
            write_stream(aside, [data])
            rename(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """:func:`write_bytes` of :func:`json_text`."""
    write_text(path, json_text(data))


def json_text(data: Any) -> str:
    """The one rendering of JSON files here: one key a line, ASCII, newline at the end."""
    return json.dumps(data, indent=1) + "\n"


def append_line(path: Path, line: str) -> None:
    """Add one line in a single write, so that lines of one writer never mix.

    Not synced: a power cut may cost the last lines of a log, a killed process may not.

    Raises:
        EnvironmentFault: the machine refused.
    """
    data = memoryview(f"{line}\n".encode())
    with guard(f"writing {path}", path.parent, need=len(data)):
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            _write_all(fd, data, path)
        finally:
            os.close(fd)


# --- folders --------------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """``mkdir -p`` whose names are durable.

    Raises:
        EnvironmentFault: not allowed, or a file is in the way.
    """
    with guard(f"creating {path}", path.parent):
        if path.is_dir():
            return
        make_folder(path.parent)
        try:
            _mkdir(path)
        except FileExistsError:
            if not path.is_dir():  # else another process was faster
                raise
        sync_folder(path.parent)


def new_folder(path: Path) -> None:
    """An empty folder at ``path``, after removing what an earlier failure left there."""
    with guard(f"creating {path}", path.parent):
        if path.exists():
            remove_tree_safely(path)
        _mkdir(path)


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """A new folder beside ``final``, for :func:`publish`; gone afterwards unless it was published.

    Its process holds a lock on it, so that what a killed one left is known for certain, whatever became of its pid or
    on which machine it ran; those leftovers are removed here.

    Raises:
        EnvironmentFault: the machine refused.
    """
    make_folder(final.parent)
    _sweep(final)
    folder = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    new_folder(folder)
    lock = _lock_folder(folder)
    try:
        yield folder
    finally:
        if folder.exists():
            with suppress(EnvironmentFault):  # the first fault is the one to report
                remove_tree_safely(folder)
        if lock is not None:
            os.close(lock)


def _sweep(final: Path) -> None:
    leftover = re.compile(rf"\.(dead-)?tmp-{re.escape(final.name)}(-\d+)+")
    with guard(f"tidying {final.parent}", final.parent):
        for path in sorted(final.parent.iterdir()):
            if leftover.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                lock = _lock_folder(path)
                if lock is None:
                    continue
                try:
                    remove_tree_safely(path)
                finally:
                    os.close(lock)


def _lock_folder(path: Path) -> int | None:
    """A descriptor that locks the folder while it is open; None when another process does, or the disk cannot."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
        else:
            return fd
    return None


def publish(aside: Path, final: Path) -> None:
    """Give a finished folder its name. When this returns, the folder and all its files survive a power cut.

    Raises:
        EnvironmentFault: the machine refused; ``final`` does not exist.
    """
    with guard(f"writing {final}", final.parent):
        for path in sorted(aside.iterdir()):
            _sync_file(path)
        sync_folder(aside)
        rename(aside, final)
        sync_folder(final.parent)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _fsync(fd, path)
    finally:
        os.close(fd)


def remove_tree_safely(path: Path) -> None:
    """Delete a folder or file; a folder loses its name first, so that a half-deleted one is never taken for whole.

    Raises:
        EnvironmentFault: the machine refused.
    """
    with guard(f"deleting {path}", path.parent):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".dead-"):
            dead = path.with_name(f".dead-{path.name.lstrip('.')}-{os.getpid()}")
            if dead.exists():
                _delete(dead)
            rename(path, dead)
            sync_folder(path.parent)
            path = dead
        _delete(path)
        sync_folder(path.parent)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        _unlink(path)
        return
    for inner in sorted(path.iterdir()):
        _delete(inner)
    _rmdir(path)


# --- locks ----------------------------------------------------------------------------------------------------------


class Lock:
    """Exclusive use of a folder, given back by the kernel when the process ends, however it ends.

    The file says who holds it; it is emptied on release and never deleted, because a name that comes and goes could
    be locked twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None

    def take(self, owner: str) -> str:
        """Lock and sign with ``owner``; returns what the file said before: "" or a holder that died.

        Raises:
            BlockingIOError: another process holds it; :meth:`holder` tells which.
            EnvironmentFault: the machine refused.
        """
        fd = _open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        before = self.holder()
        self._fd = fd
        self._sign(owner)
        os.register_at_fork(after_in_child=self._forget)
        return before

    def holder(self) -> str:
        """What the holder wrote."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def release(self) -> None:
        """Let the next one in."""
        if self._fd is not None:
            self._sign("")
            self._forget()

    def _sign(self, owner: str) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            _write_all(self._fd, memoryview(owner.encode()), self.path)

    def _forget(self) -> None:
        """Close without unlocking: a forked worker that outlives its parent must not keep the folder locked."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
