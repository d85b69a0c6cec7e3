"""Durable files: all or nothing, short writes finished, every refusal of the machine one line and exit code 6."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sextant.core import fs
from sextant.core.errors import EnvironmentFault


@pytest.fixture
def refuse():
    """Make the n-th step of one kind raise an errno."""
    installed = []

    def install(operation, code, nth=0):
        passed = iter(range(10**9))

        def hook(step, path):
            if step == operation and next(passed) == nth:
                raise OSError(code, os.strerror(code), str(path))

        installed.append(hook)
        fs.hooks.append(hook)

    yield install
    for hook in installed:
        fs.hooks.remove(hook)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_whole_and_leaves_nothing_else(tmp_path):
    data = random.Random(1).randbytes(100_000)
    fs.write_bytes(tmp_path / "a", b"old")
    fs.write_bytes(tmp_path / "a", data)
    fs.write_json(tmp_path / "b.json", {"x": [1, 2.5, "é"]})
    assert (tmp_path / "a").read_bytes() == data
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [1, 2.5, "é"]}
    assert names(tmp_path) == ["a", "b.json"]


def test_order_of_steps_makes_the_file_durable(tmp_path):
    seen = []
    fs.hooks.append(lambda operation, path: seen.append(operation))
    try:
        fs.write_bytes(tmp_path / "a", b"bytes")
    finally:
        fs.hooks.pop()
    assert seen == ["open", "write", "fsync", "rename", "fsync-folder"]


@pytest.mark.parametrize(
    ("operation", "code", "words"),
    [
        ("open", errno.EACCES, "no permission writing"),
        ("open", errno.EROFS, "read-only disk writing"),
        ("write", errno.ENOSPC, "disk full writing"),
        ("write", errno.EDQUOT, "disk quota used up writing"),
        ("write", errno.EFBIG, "file size limit reached writing"),
        ("fsync", errno.EIO, "disk error writing"),
        ("rename", errno.EIO, "disk error writing"),
        ("fsync-folder", errno.EIO, "disk error writing"),
    ],
)
def test_refusals_name_the_cause_and_keep_the_old_file(tmp_path, refuse, operation, code, words):
    path = tmp_path / "a"
    fs.write_bytes(path, b"old")
    refuse(operation, code)
    with pytest.raises(EnvironmentFault, match=words) as caught:
        fs.write_bytes(path, b"new")
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == (b"new" if operation == "fsync-folder" else b"old")
    assert names(tmp_path) == ["a"]


def test_room_is_reported_when_it_ran_out(tmp_path, refuse):
    refuse("write", errno.ENOSPC)
    with pytest.raises(EnvironmentFault, match=r"\(need 3\.0 KiB, free [\d.]+ \wiB\)"):
        fs.write_bytes(tmp_path / "a", bytes(range(256)) * 12)


@pytest.mark.parametrize("taken", [1, 7, 4096])
def test_short_writes_are_finished(tmp_path, monkeypatch, taken):
    """A5: the system may take only some of the bytes of each call."""
    write, data = os.write, random.Random(taken).randbytes(taken * 50 + 3)
    monkeypatch.setattr(fs.os, "write", lambda fd, view: write(fd, view[:taken]))
    written = fs.write_stream(tmp_path / "a", [data[:100], memoryview(data)[100:]])
    assert (tmp_path / "a").read_bytes() == data
    assert written.bytes == len(data)


def test_a_real_size_limit_gives_a_short_write_then_a_fault(tmp_path):
    """A3, A5: the kernel writes up to the limit, then refuses."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom sextant.core import fs\n"
        "from sextant.core.errors import SextantError\n"
        "try:\n    fs.write_bytes(Path(sys.argv[1]), bytes(range(256)) * 1024)\n"
        "except SextantError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    limit = 100_000
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 6, done.stderr
    assert done.stdout.startswith("file size limit reached writing") and "need 256.0 KiB" in done.stdout
    assert names(tmp_path) == []


def test_the_outermost_guard_words_the_fault(tmp_path, refuse):
    refuse("write", errno.ENOSPC)
    with (
        pytest.raises(EnvironmentFault, match=r"disk full writing step 3 \(need 1\.9 GiB, free .*\); step 2 is intact"),
        fs.guard("writing step 3", tmp_path, need=2_040_109_466, note="step 2 is intact"),
    ):
        fs.write_bytes(tmp_path / "a", b"x")


def test_a_guard_passes_other_faults_on(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"^in use$"), fs.guard("writing", tmp_path):
        raise EnvironmentFault("in use")


def test_append_makes_whole_lines(tmp_path):
    for n in range(5):
        fs.append_line(tmp_path / "log", f"line {n}")
    assert (tmp_path / "log").read_text().split("\n") == [f"line {n}" for n in range(5)] + [""]


def test_folders_are_made_once_and_files_in_the_way_are_named(tmp_path):
    fs.make_folder(tmp_path / "a" / "b")
    fs.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(EnvironmentFault, match=f"a file is in the way creating {tmp_path / 'file'}"):
            fs.make_folder(path)


def test_publish_names_a_folder_only_after_its_files_are_synced(tmp_path):
    aside = tmp_path / ".tmp-x"
    fs.new_folder(aside)
    for name in ("a", "b"):
        fs.write_stream(aside / name, [name.encode()])
    seen = []
    fs.hooks.append(lambda operation, path: seen.append((operation, path.name)))
    try:
        fs.publish(aside, tmp_path / "x")
    finally:
        fs.hooks.pop()
    assert seen[:2] == [("fsync", "a"), ("fsync", "b")]
    assert seen[2:] == [("fsync-folder", ".tmp-x"), ("rename", "x"), ("fsync-folder", tmp_path.name)]
    assert names(tmp_path) == ["x"]


def test_a_folder_aside_is_gone_unless_it_was_published(tmp_path):
    with fs.folder_aside(tmp_path / "new" / "out") as folder:
        fs.write_stream(folder / "a", [b"a"])
        fs.publish(folder, tmp_path / "new" / "out")
    with pytest.raises(ZeroDivisionError), fs.folder_aside(tmp_path / "other"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["out"]


def test_what_a_killed_process_left_aside_is_removed_and_nothing_else(tmp_path):
    program = (
        "import sys, pathlib; from sextant.core import fs\n"
        "with fs.folder_aside(pathlib.Path(sys.argv[1])) as folder: print(folder.name, flush=True); input()"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "out")]
    living, killed = (
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    kept, left = (process.stdout.readline().strip() for process in (living, killed))
    killed.kill()
    killed.communicate()
    others = [".tmp-out-notes", ".tmp-output-7"]  # not of this target
    for name in (*others, f".dead-{left[1:]}-7"):
        (tmp_path / name).mkdir()
    with fs.folder_aside(tmp_path / "out") as folder:
        assert names(tmp_path) == sorted([kept, folder.name, *others])
    living.communicate("\n")
    assert names(tmp_path) == others


def test_publish_never_replaces_a_folder(tmp_path):
    for name in ("x", ".tmp-x"):
        fs.new_folder(tmp_path / name)
        fs.write_stream(tmp_path / name / "a", [name.encode()])
    with pytest.raises(EnvironmentFault):
        fs.publish(tmp_path / ".tmp-x", tmp_path / "x")
    assert (tmp_path / "x" / "a").read_text() == "x"


def test_a_folder_loses_its_name_before_its_files(tmp_path):
    tree = tmp_path / "step"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").write_text("x")
    (tree / "link").symlink_to(tmp_path)
    seen = []
    fs.hooks.append(lambda operation, path: seen.append(operation))
    try:
        fs.remove_tree_safely(tree)
    finally:
        fs.hooks.pop()
    assert seen[0] == "rename"
    assert seen.index("fsync-folder") < seen.index("unlink")
    assert names(tmp_path) == []


def test_a_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    first, second = fs.Lock(path), fs.Lock(path)
    assert first.take("first") == ""
    with pytest.raises(BlockingIOError):
        second.take("second")
    assert second.holder() == "first"
    first.release()
    assert second.take("second") == ""
    second.release()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock, ready, done = fs.Lock(tmp_path / "lock"), os.pipe(), os.pipe()
    lock.take("parent")
    child = os.fork()
    if child == 0:
        os.close(done[1])
        os.write(ready[1], b"r")
        os.read(done[0], 1)  # lives on until the parent closes its end
        os._exit(0)
    os.read(ready[0], 1)
    lock._forget()  # as the death of the parent would: closed without unlocking
    assert fs.Lock(tmp_path / "lock").take("next") == "parent"
    os.close(done[1])
    os.waitpid(child, 0)
    for end in (*ready, done[0]):
        os.close(end)


def test_nothing_else_opens_files_for_writing():
    """Training code writes through this module alone, so that every write is durable and can be interrupted."""
    source = Path(fs.__file__).parents[1] / "train"
    for path in source.glob("*.py"):
        text = path.read_text()
        for call in (".write_text(", ".write_bytes(", 'open("w', ".mkdir(", ".unlink(", "torch.save(", "rmtree("):
            hits = [line for line in text.splitlines() if call in line and f"fs{call}" not in line]
            assert hits == [], f"{path.name}: {hits}"
