"""Checkpoints: what is saved is what loads, and nothing else ever loads."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sextant.core import fs, tensorfile
from sextant.core.errors import CheckpointError, EnvironmentFault, UsageError
from sextant.train import checkpoint

IDENTITY = {"recipe": "twin", "tokenizer": "ab12", "config": "77", "threads": 1, "torch": "2.11", "device": "cpu"}
STATE = {"loader": {"sample": 1234, "seed": 7}, "spikes": [0.5, 1e-3], "tokens": 10**12}


def parts(step=1):
    generator = torch.Generator().manual_seed(step)
    model = {
        "embed.weight": torch.randn(40, 16, generator=generator),
        "layers.0.norm": torch.randn(16, generator=generator).bfloat16(),
        "layers.0.w": torch.randn(16, 24, generator=generator).t(),
        "layers.0.bias": torch.randn((), generator=generator),
        "layers.0.none": torch.empty(0, 3),
    }
    optimizer = {f"exp_avg.{name}": tensor.float() ** 2 for name, tensor in model.items()}
    return {"model": model, "optimizer": optimizer, "rng": {"cpu": generator.get_state()}}


def save(root, step, **changes):
    given = {"parts": parts(step), "state": STATE, "identity": IDENTITY, **changes}
    return checkpoint.save(root, step, **given)


def assert_holds(found, step):
    assert found.step == step
    for part, tensors in parts(step).items():
        assert list(found.parts[part]) == list(tensors)
        for name, tensor in tensors.items():
            assert found.parts[part][name].dtype == tensor.dtype
            assert torch.equal(found.parts[part][name], tensor), name


def dotted(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@pytest.fixture
def hook():
    installed = []

    def install(function):
        installed.append(function)
        fs.hooks.append(function)

    yield install
    for function in installed:
        fs.hooks.remove(function)


def failing(code, nth, operation=None):
    passed = iter(range(10**9))

    def refuse(step, path):
        if operation in (None, step) and next(passed) == nth:
            raise OSError(code, os.strerror(code), str(path))

    return refuse


# --- round trips ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 300)
    assert path.name == "step-00000300"
    found = checkpoint.load(path)
    assert_holds(found, 300)
    assert found.state == STATE
    assert found.manifest["identity"] == IDENTITY
    assert found.notes == ()


def test_files_are_plain_safetensors_for_the_library(tmp_path):
    path = save(tmp_path, 3)
    model = load_file(path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in model.items()} == {
        name: tensor.tolist() for name, tensor in parts(3)["model"].items()
    }


def test_the_manifest_says_what_is_where(tmp_path):
    manifest = json.loads((save(tmp_path, 3) / "manifest.json").read_text())
    assert list(manifest)[-1] == "digest"
    assert manifest["tensors"]["model"]["layers.0.w"] == {
        "dtype": "F32",
        "shape": [24, 16],
        "shards": [{"file": "model.safetensors", "range": [[0, 24], [0, 16]]}],
    }
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(tensorfile.DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.integers(0, 2**31),
)
def test_every_dtype_and_shape_survives(tmp_path_factory, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    written = fs.write_stream(path, tensorfile.chunks(tensors))
    found = tensorfile.read(path)
    assert written.bytes == path.stat().st_size
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].tolist() == tensor.tolist()


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, state={"try": 1})
    save(tmp_path, 5, state={"try": 2})
    found, lines = checkpoint.newest(tmp_path)
    assert found.state == {"try": 2} and lines == [] and dotted(tmp_path) == []


def test_verifying_is_fast(tmp_path):
    """Over 1 GB/s on an idle core that has SHA instructions; the bound leaves room for a busy one without."""
    path = save(tmp_path, 1, parts={"model": {"w": torch.rand(16 << 20)}})
    began = time.perf_counter()
    checkpoint.verify(path)
    assert (64 << 20) / (time.perf_counter() - began) > 0.1e9


@pytest.mark.parametrize("name", ["../../etc/x", "/abs", "a/b", "a\\b", "a\nb", "a\x1b[31mb", "", ".hidden", "x" * 501])
def test_names_that_are_refused_are_not_written_either(tmp_path, name):
    with pytest.raises(CheckpointError, match="tensor name refused"):
        save(tmp_path, 1, parts={"model": {name: torch.rand(3)}})
    assert list(tmp_path.iterdir()) == []


def test_tied_tensors_are_saved_under_one_name(tmp_path):
    weight = torch.rand(4, 4)
    with pytest.raises(CheckpointError, match="'embed' and 'head' share memory"):
        save(tmp_path, 1, parts={"model": {"embed": weight, "head": weight.view(4, 4)}})
    halves = torch.rand(8).chunk(2)
    save(tmp_path, 1, parts={"model": {"a": halves[0], "b": halves[1]}})


def test_a_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be saved in safetensors"):
        save(tmp_path, 1, parts={"model": {"z": torch.rand(3).to(torch.complex64)}})


# --- faults of the machine while saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_fault_at_any_step_of_a_save_loses_nothing(tmp_path, hook, code):
    """A3, A4: every primitive of a save refused in turn; the older step loads and the next save works."""
    save(tmp_path, 1)
    seen = []
    hook(lambda operation, path: seen.append(operation))
    save(tmp_path, 2)
    total = len(seen)
    shutil.rmtree(tmp_path / "step-00000002")
    for nth in range(total):
        refuse = failing(code, nth)
        fs.hooks.append(refuse)
        with pytest.raises(EnvironmentFault, match=r"writing step 2.*; step 1 is intact") as caught:
            save(tmp_path, 2)
        fs.hooks.remove(refuse)
        assert caught.value.exit_code == 6
        found, _ = checkpoint.newest(tmp_path)
        assert_holds(found, found.step)
        assert dotted(tmp_path) == []
        save(tmp_path, 2)
        shutil.rmtree(tmp_path / "step-00000002")
    assert total > 20


def test_a_fault_while_replacing_a_step_leaves_the_old_one_readable(tmp_path, hook):
    """Readers see it at once, without tidying."""
    save(tmp_path, 1)
    for nth in range(40):
        save(tmp_path, 2)
        refuse = failing(errno.ENOSPC, nth)
        fs.hooks.append(refuse)
        try:
            save(tmp_path, 2)
        except EnvironmentFault as fault:
            assert "step 1 is intact" in str(fault)
        fs.hooks.remove(refuse)
        assert_holds(checkpoint.search(tmp_path)[0], 2)


def test_disk_full_says_what_is_needed_and_what_is_intact(tmp_path, hook):
    save(tmp_path, 250)
    hook(failing(errno.ENOSPC, 3, "write"))
    with pytest.raises(EnvironmentFault) as caught:
        save(tmp_path, 300)
    need = sum(t.numel() * t.element_size() for group in parts().values() for t in group.values()) / 1024
    assert str(caught.value).startswith(f"disk full writing step 300 (need {need:.1f} KiB, free ")
    assert "); step 250 is intact. Make room in" in str(caught.value)


def test_the_first_save_says_that_nothing_older_exists(tmp_path, hook):
    hook(failing(errno.ENOSPC, 0, "write"))
    with pytest.raises(EnvironmentFault, match="no older step exists"):
        save(tmp_path / "new", 1)


def test_a_failed_sync_is_never_tried_again_on_the_same_file(tmp_path, hook):
    """A4: after EIO the kernel may call the pages clean; only a file that is written anew can be trusted."""
    hook(failing(errno.EIO, 0, "fsync"))
    synced = []
    hook(lambda operation, path: synced.append(path) if operation == "fsync" else None)
    with pytest.raises(EnvironmentFault, match="disk error writing step 1"):
        save(tmp_path, 1)
    assert synced == []  # the refused sync was the last
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 1)
    assert_holds(checkpoint.newest(tmp_path)[0], 1)


SMALL_DISK = """
import resource, subprocess, sys, torch
from pathlib import Path
from sextant.core.errors import SextantError
from sextant.train import checkpoint
root = Path(sys.argv[1])
mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
if sys.argv[2] == "limit" or subprocess.run(mount, capture_output=True).returncode:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.save(root, 250, {"model": {"w": torch.rand(2000)}}, {}, {})
try:
    checkpoint.save(root, 300, {"model": {"w": torch.rand(200_000)}}, {}, {})
except SextantError as error:
    print(error.exit_code, error)
found, lines = checkpoint.newest(root)
print(found.step, lines, sorted(path.name for path in root.iterdir()))
"""


def private_mounts():
    """Mounts made behind this prefix vanish with the process; without the right to make any, none are made."""
    prefix = ["unshare", "--mount"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


def test_a_small_disk_fills_up(tmp_path):
    """A3 on a real file system of 256 KiB where one can be mounted, by a file size limit elsewhere."""
    prefix = private_mounts()
    command = [*prefix, sys.executable, "-c", SMALL_DISK, str(tmp_path), "mount" if prefix else "limit"]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.match(r"6 (disk full|file size limit reached) writing step 300 \(need 781\.2 KiB, free", first), first
    assert "step 250 is intact" in first
    assert second == "250 [] ['step-00000250']"


# --- damage after saving ----------------------------------------------------------------------------------------------


def files(path):
    return sorted(item for item in path.iterdir() if item.is_file())


@pytest.mark.parametrize("cut", ["one byte", "half", "all"])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, cut):
    """A9."""
    for name in [path.name for path in files(save(tmp_path, 250))]:
        save(tmp_path, 300)
        path = tmp_path / "step-00000300" / name
        whole = path.stat().st_size
        left = {"one byte": whole - 1, "half": whole // 2, "all": 0}[cut]
        os.truncate(path, left)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path.parent)
        assert caught.value.exit_code == 4 and name in str(caught.value)
        assert "Delete the folder or resume from step-00000250" in str(caught.value)
        if name != "manifest.json":
            sizes = f"got {left:,} bytes, expected {whole:,} bytes by its manifest"
            assert f"wrong size: step-00000300/{name} ({sizes})" in str(caught.value)
        found, lines = checkpoint.newest(tmp_path)
        assert_holds(found, 250)
        assert len(lines) == 1 and lines[0].startswith("skipped step 300: ")
        shutil.rmtree(path.parent)


def test_every_flipped_bit_is_detected(tmp_path):
    """A10: 300 single-bit flips over all files, the manifest among them; none loads."""
    path = save(tmp_path, 1)
    chance = random.Random(3)
    whole = {file: file.read_bytes() for file in files(path)}
    for flip in range(300):
        file = list(whole)[flip % len(whole)]
        data = bytearray(whole[file])
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
        file.write_bytes(whole[file])
    assert_holds(checkpoint.load(path), 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b"[1, 2]\n", "damaged manifest"),
        (b"{}\n", "damaged manifest"),
        (b'{"step": 1, "step": 2}\n', "key written twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "damaged manifest"),
        (b'{"schema_version": 99}\n', "unknown manifest version"),
    ],
)
def test_a_corrupt_manifest_is_named(tmp_path, content, words):
    """A11."""
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(path)
    assert "manifest.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("where, field", [("files", "../../outside"), ("tensors", "model")])
def test_a_sound_digest_does_not_make_a_sound_manifest(tmp_path, where, field):
    """The digest is no signature: a crafted manifest may neither lead out of its folder nor hold something else."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest[where][field] = manifest["files"]["state.json"] if where == "files" else 5
    (path / "manifest.json").write_bytes(checkpoint._render(manifest))
    with pytest.raises(CheckpointError, match="not a manifest of this program"):
        checkpoint.load(path)


def test_a_missing_file_is_named_and_an_extra_one_is_ignored_with_a_line(tmp_path):
    """A12."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "notes.txt").write_text("mine")
    found, lines = checkpoint.newest(tmp_path)
    assert found.step == 2 and lines == ["ignored step-00000002/notes.txt: not in the manifest"]
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing file: step-00000002/optimizer\.safetensors"):
        checkpoint.load(path)


def test_when_nothing_loads_the_run_does_not_start_afresh(tmp_path):
    """A9: exit 4 when the damaged checkpoint is the only one."""
    path = save(tmp_path, 1)
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="Delete the folder; no older step exists here"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_foreign_folder_is_never_advised_to_be_deleted(tmp_path, content):
    foreign = tmp_path / "etc"
    foreign.mkdir()
    if content:
        (foreign / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="Name a run folder, which holds checkpoints/, or") as caught:
        checkpoint.load(foreign)
    assert "Delete" not in str(caught.value)


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "missing") == (None, [])


def test_a_renamed_folder_does_not_change_its_step(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="folder and manifest name different steps"):
        checkpoint.load(tmp_path / "step-00000009")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value, dtype):
    """B5: hashed correctly, and still useless."""
    save(tmp_path, 1)
    weight = torch.rand(50)
    weight[17] = value
    save(tmp_path, 2, parts={"model": {"layers.3.w": weight.to(dtype)}})
    with pytest.raises(CheckpointError, match=r"NaN or infinity in the model: step-00000002/layers\.3\.w") as caught:
        checkpoint.load(tmp_path / "step-00000002")
    assert caught.value.exit_code == 4
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_large_finite_weights_are_not_mistaken_for_infinity(tmp_path):
    big = torch.full((4,), 3e38) * (1 + torch.rand(4) / 100)
    path = save(tmp_path, 1, parts={"model": {"w": big, "v": torch.rand(3, dtype=torch.float64) * 1e300}})
    assert torch.equal(checkpoint.load(path).parts["model"]["w"], big)


# --- which one is the newest ------------------------------------------------------------------------------------------


def test_order_is_by_step_whatever_the_clock_says(tmp_path):
    """A16."""
    for step in (2, 10, 9):
        save(tmp_path, step)
    for age, step in enumerate((10, 9, 2)):
        os.utime(tmp_path / f"step-{step:08d}", (10**9 - age, 2 * 10**9 * (age % 2)))
    assert checkpoint.steps(tmp_path) == [2, 9, 10]
    assert checkpoint.newest(tmp_path)[0].step == 10


def test_only_full_names_count_and_pointers_are_ignored(tmp_path):
    """A8: a pointer that runs ahead of the data decides nothing."""
    save(tmp_path, 7)
    for name in ("step-00000099-old", "xstep-00000098", "step-97", "step-000000096", "step-0000009x"):
        shutil.copytree(tmp_path / "step-00000007", tmp_path / name)
    (tmp_path / "step-00000095").write_text("a file")
    (tmp_path / "latest").write_text("step-00000100")
    assert checkpoint.steps(tmp_path) == [7]
    assert checkpoint.newest(tmp_path)[0].step == 7


def test_leftovers_go_and_are_reported_while_readers_change_nothing(tmp_path):
    path = save(tmp_path, 1)
    for name in (".tmp-step-00000002-77", ".dead-step-00000000-77"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / ".tmp-file-3").write_text("half")
    before = sorted(dotted(tmp_path))
    assert checkpoint.search(tmp_path)[0].step == 1
    assert sorted(dotted(tmp_path)) == before
    lines = checkpoint.newest(tmp_path)[1]
    assert len(lines) == 3 and all(line.startswith("removed .") for line in lines)
    assert dotted(tmp_path) == []


def test_an_unfinished_replacement_gets_its_name_back(tmp_path):
    save(tmp_path, 4).rename(tmp_path / ".was-step-00000004")
    found, lines = checkpoint.newest(tmp_path)
    assert_holds(found, 4)
    assert lines == ["restored step-00000004: its replacement was not finished"]


def test_retention_keeps_the_newest_and_the_permanent_ones(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step)
    gone = checkpoint.retain(tmp_path, keep=3, permanent_every=5)
    assert checkpoint.steps(tmp_path) == [5, 8, 9, 10]
    assert [path.name for path in gone] == [f"step-{step:08d}" for step in (1, 2, 3, 4, 6, 7)]
    assert checkpoint.retain(tmp_path, keep=3, permanent_every=5) == []
    assert dotted(tmp_path) == []


def test_retention_keeps_everything_when_the_newest_is_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 9)
    with pytest.raises(CheckpointError, match="wrong size"):
        checkpoint.retain(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_fewer_than_two_are_never_kept(tmp_path):
    with pytest.raises(UsageError, match="keep"):
        checkpoint.retain(tmp_path, keep=1)


def test_going_back_discards_what_came_later(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.discard_after(tmp_path, 1)
    assert checkpoint.newest(tmp_path)[0].step == 1


# --- does it fit ------------------------------------------------------------------------------------------------------


def test_what_changes_bits_is_a_warning(tmp_path):
    """A14."""
    manifest = checkpoint.verify(save(tmp_path, 1))
    assert checkpoint.require_compatible(manifest, IDENTITY) == []
    changed = {**IDENTITY, "threads": 2, "torch": "2.13", "device": "cuda", "config": "78"}
    assert checkpoint.require_compatible(manifest, changed) == [
        "bitwise resume not guaranteed: threads 1 -> 2",
        "bitwise resume not guaranteed: torch 2.11 -> 2.13",
        "bitwise resume not guaranteed: device cpu -> cuda",
        "configuration changed since step 1",
    ]


@pytest.mark.parametrize("field", ["recipe", "tokenizer"])
def test_what_must_agree_is_an_error_that_names_it(tmp_path, field):
    manifest = checkpoint.verify(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match=rf"another {field}: step 1 \(got \w+, expected other\)") as caught:
        checkpoint.require_compatible(manifest, {**IDENTITY, field: "other"})
    assert caught.value.exit_code == 4


def test_digests_that_differ_are_shown_short(tmp_path):
    manifest = checkpoint.verify(save(tmp_path, 1, identity={"tokenizer": "a" * 64}))
    with pytest.raises(CheckpointError, match=r"\(got a{12}, expected b{12}\)"):
        checkpoint.require_compatible(manifest, {"tokenizer": "b" * 64})


def test_an_unrecorded_tokenizer_is_said(tmp_path):
    manifest = checkpoint.verify(save(tmp_path, 1, identity={"recipe": "twin"}))
    assert checkpoint.require_compatible(manifest, IDENTITY) == ["checkpoint does not record its tokenizer"]


def test_wrong_tensors_are_listed_five_at_a_time(tmp_path):
    """E4."""
    manifest = checkpoint.verify(save(tmp_path, 1))
    shapes = {name: list(tensor.shape) for name, tensor in parts()["model"].items()}
    assert checkpoint.require_compatible(manifest, {"tensors": shapes}) == []
    needed = {**shapes, "embed.weight": [41, 16], **{f"layers.1.{i}": [2, i] for i in range(6)}}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_compatible(manifest, {"tensors": needed})
    text = str(caught.value)
    assert "embed.weight got [40, 16], expected [41, 16]" in text
    assert "layers.1.3 got nothing, expected [2, 3]" in text and "layers.1.4" not in text
    assert text.endswith("and 2 more") and caught.value.exit_code == 4


def test_unexpected_tensors_are_listed_too():
    with pytest.raises(CheckpointError, match=r"model: b got \[2\], expected nothing"):
        checkpoint.require_tensors({"a": torch.rand(1), "b": torch.rand(2)}, {"a": torch.rand(1)}, "model")
    checkpoint.require_tensors({"a": torch.rand(1)}, {"a": torch.empty(1, device="meta")}, "model")


# --- files from strangers ---------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickles_are_refused_and_never_opened(tmp_path, name, wrapped):
    """E1."""
    bomb = tmp_path / "exploded"
    folder = tmp_path / "model"
    folder.mkdir()
    if wrapped:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(bomb)))
    else:
        (folder / name).write_bytes(pickle.dumps(Bomb(bomb)))
    for path in (folder, folder / name):
        with pytest.raises(
            CheckpointError, match=f"{name} is a pickle file, which can run code: .* Ask for safe"
        ) as caught:
            checkpoint.load(path)
        assert caught.value.exit_code == 4
    assert not bomb.exists()


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(*offsets, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CRAFTED = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "length 2^63": header({"a": tensor(0, 4)}, b"abcd", 2**63),
    "length 200 MB": header({"a": tensor(0, 4)}, b"abcd", 200 << 20),
    "overlap": header({"a": tensor(0, 4), "b": tensor(2, 6)}, b"abcdef"),
    "hole": header({"a": tensor(0, 4), "b": tensor(6, 10)}, b"abcdefghij"),
    "overflowing shape": header({"a": tensor(0, 4, shape=(2**62, 2**62, 4))}, b"abcd"),
    "negative offset": header({"a": tensor(-4, 0)}, b"abcd"),
    "short data": header({"a": tensor(0, 4)}, b"abc"),
    "trailing byte": header({"a": tensor(0, 4)}, b"abcde"),
    "bad JSON": header(b'{"a": '),
    "a list": header(b"[]"),
    "deep nesting": header(b"[" * 50_000),
    "many digits": header(b'{"a": ' + b"1" * 5000 + b"}"),
    "duplicate key": header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 4)).encode(),) * 2), b"abcd"),
    "path name": header({"../../etc/x": tensor(0, 4)}, b"abcd"),
    "control name": header({"a\x1b[2Jb": tensor(0, 4)}, b"abcd"),
    "too many tensors": header({f"t{i}": tensor(0, 0, shape=(0,)) for i in range(100_001)}),
    "unknown dtype": header({"a": tensor(0, 4, dtype="Q4")}, b"abcd"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_safetensors_are_refused_quickly(tmp_path, case):
    """E2, E3, in under a second."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(CRAFTED[case])
    began = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        tensorfile.read(path)
    assert time.perf_counter() - began < 1
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_checkpoint_around_a_crafted_file_is_refused_too(tmp_path):
    """With a manifest whose hashes fit."""
    tensors = checkpoint.verify(save(tmp_path, 1))["tensors"]
    for case in ("duplicate key", "path name", "overlap"):
        path = tmp_path / "step-00000001"
        (path / "rng.safetensors").write_bytes(CRAFTED[case])
        files = {file.name: hashed(file) for file in path.iterdir() if file.name != "manifest.json"}
        manifest = {"schema_version": 1, "step": 1, "identity": {}, "files": files, "tensors": tensors}
        (path / "manifest.json").write_bytes(checkpoint._render(manifest))
        assert checkpoint.verify(path)["step"] == 1
        with pytest.raises(CheckpointError, match=r"rng\.safetensors"):
            checkpoint.load(path)


def test_a_file_with_other_tensors_than_the_manifest_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    save_file({"cpu": torch.rand(3)}, path / "rng.safetensors")
    manifest["files"]["rng.safetensors"] = hashed(path / "rng.safetensors")
    (path / "manifest.json").write_bytes(checkpoint._render(manifest))
    with pytest.raises(CheckpointError, match="tensor 'cpu' differs from the manifest"):
        checkpoint.load(path)


def hashed(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_checks_do_not_depend_on_assertions():
    """E9: python -O removes assertions; none of the checks may be one."""
    root = Path(checkpoint.__file__).parents[1]
    for path in (root / "core" / "fs.py", root / "core" / "tensorfile.py", *(root / "train").glob("*.py")):
        assert not [line for line in path.read_text().splitlines() if line.lstrip().startswith("assert ")], path


def test_refusals_are_the_same_under_optimised_python(tmp_path):
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2) / "model.safetensors", 50)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({}))
    program = (
        "import sys\nfrom pathlib import Path\nfrom sextant.train import checkpoint\n"
        "from sextant.core.errors import SextantError\n"
        "root = Path(sys.argv[1])\nprint(checkpoint.newest(root)[1])\n"
        "for path in (root / 'step-00000002', root / 'model.pt', root / 'none'):\n"
        "    try:\n        checkpoint.load(path)\n"
        "    except SextantError as error:\n        print(error.exit_code, error)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, *flags, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
        )
        for flags in ([], ["-O"])
    ]
    assert runs[0].stdout == runs[1].stdout
    assert [line[:2] for line in runs[0].stdout.splitlines()[1:]] == ["4 "] * 3
