"""A record of choices by itself: cut, joined, compared, saved and read back with distrust."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sextant.core.errors import CheckpointError, UsageError
from sextant.core.trace import Reads, Routes, Trace, narrow

T = 9


def drawn(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape)


def record(tokens: int = T, experts: int = 300, masks: bool = True) -> Trace:
    """Layers 1 and 4 route, 0 and 4 select; layer 4 drops copies."""
    kept_TA = torch.rand(tokens, 3) < 0.7 if masks else None
    routes = {1: Routes(drawn(experts, tokens, 2), experts), 4: Routes(drawn(8, tokens, 3), 8, kept_TA)}
    reads = {0: Reads(drawn(40, tokens, 4, 5, low=-1), 16), 4: Reads(drawn(70_000, tokens, 1, 2, low=-1), 1)}
    return Trace(tokens, routes, reads)


def test_what_is_cut_and_joined_is_the_same():
    trace = record()
    assert trace.same(Trace.cat([trace[:4], trace[4:5], trace[5:]]))
    assert trace.same(Trace.cat(trace.split([2, 0, 7])))
    assert [part.tokens for part in trace.split([2, 0, 7])] == [2, 0, 7]
    some = trace[torch.tensor([7, 0, 0])]
    assert some.tokens == 3 and torch.equal(some.routes[1].experts_TA, trace.routes[1].experts_TA[[7, 0, 0]])
    odd = trace[torch.arange(T) % 2 == 1]
    assert odd.same(trace[1::2]) and odd.tokens == 4
    assert not trace[:4].same(trace[4:8])


def test_chunks_with_fewer_places_and_without_drops_join_the_others():
    """A short past fills fewer places; a step in which nothing was dropped has no mask."""
    one, two = record(4, masks=False), record(5)
    one = Trace(4, one.routes, {0: Reads(one.reads[0].blocks_THJ[..., :2], 16), 4: one.reads[4]})
    both = Trace.cat([one, two])
    assert both.reads[0].blocks_THJ.shape == (9, 4, 5) and (both.reads[0].blocks_THJ[:4, :, 2:] == -1).all()
    assert both.routes[4].kept_TA is not None and both.routes[4].kept_TA[:4].all()
    assert both[:4].same(one) and both[4:].same(two)


def test_order_of_blocks_means_nothing_and_all_else_does():
    trace = record()
    mirrored = {i: Reads(reads.blocks_THJ.flip(-1), reads.block) for i, reads in trace.reads.items()}
    assert trace.same(Trace(T, trace.routes, mirrored))
    routes, other = dict(trace.routes), trace.routes[4]
    for changed in (
        Routes(other.experts_TA.flip(-1), 8, other.kept_TA),
        Routes(other.experts_TA, 8),
        Routes(other.experts_TA, 8, other.kept_TA, other.kept_TA),
        Routes(other.experts_TA, 9, other.kept_TA),
    ):
        assert not trace.same(Trace(T, routes | {4: changed}, trace.reads))
    blocks_THJ = trace.reads[0].blocks_THJ.clone()
    blocks_THJ[3, 1, 2] += 1
    assert not trace.same(Trace(T, routes, trace.reads | {0: Reads(blocks_THJ, 16)}))


def test_of_a_forward_takes_what_was_read_only():
    routing = SimpleNamespace(experts_TA=drawn(5, T, 2), probs_TE=torch.rand(T, 5), kept_TA=None, sent_TA=None)
    picked = SimpleNamespace(blocks_THJ=drawn(3, T, 2, 2), block=4, applied=True)
    learning = SimpleNamespace(blocks_THJ=drawn(3, T, 2, 2), block=4, applied=False)
    output = SimpleNamespace(hidden_TD=torch.rand(T, 6), routings={2: routing}, selections={0: picked, 1: learning})
    trace = Trace.of(output)  # type: ignore[arg-type]
    assert trace.shape == "0: 2 choosers of blocks of 4, 2: 2 of 5 experts"
    assert trace.tokens == T and trace.routes[2].experts == 5


def test_different_models_do_not_join():
    with pytest.raises(UsageError, match=r"records of different models.*2 of 300 experts.*2 of 299 experts"):
        Trace.cat([record(experts=299), record()])
    with pytest.raises(UsageError, match="no records to join"):
        Trace.cat([])
    with pytest.raises(UsageError, match="got 10, expected 9"):
        record().split([4, 6])


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 127, torch.int8), (0, 128, torch.uint8), (-1, 128, torch.int16), (0, 2**15, torch.int32), (0, 0, torch.int8)],
)
def test_numbers_take_the_smallest_type(low, high, dtype):
    x = torch.tensor([low, high])
    assert narrow(x).dtype == dtype and torch.equal(narrow(x).long(), x)
    assert narrow(x[:0]).dtype == torch.int8


@pytest.mark.parametrize("tokens", [T, 1, 0])
def test_saved_and_read_back(tmp_path, tokens):
    trace = record(tokens)
    trace.save(tmp_path / "trace.safetensors")
    found = Trace.load(tmp_path / "trace.safetensors")
    assert found.same(trace) and found.digest() == trace.digest()
    assert found.routes[1].experts_TA.dtype == torch.int64 and found.reads[4].blocks_THJ.dtype == torch.int64
    assert record(tokens + 1).digest() != trace.digest()


def test_a_file_takes_a_byte_or_two_for_each_number(tmp_path):
    """256 experts: one byte each, as 61 layers of DeepSeek-V3 take 464 bytes a token (58 MoE layers of 8)."""
    tokens = 1000
    trace = Trace(tokens, {i: Routes(drawn(256, tokens, 8), 256) for i in range(3, 61)})
    trace.save(tmp_path / "trace.safetensors")
    size = (tmp_path / "trace.safetensors").stat().st_size
    assert 464 * tokens < size < 464 * tokens + 8192


def damaged(tmp_path, change) -> Trace:
    tensors = {name: x.clone() for name, x in record()._tensors().items()}
    change(tensors)
    save_file(tensors, tmp_path / "trace.safetensors")
    return Trace.load(tmp_path / "trace.safetensors")


def about(**fields: object) -> Tensor:
    text = json.dumps({"tokens": T, "experts": {}, "blocks": {}, **fields})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("about"), "not a record of choices"),
        (lambda t: t.pop("layers.4.experts"), "layers.4.experts"),
        (lambda t: t["layers.4.experts"].fill_(8), "layer 4: an expert outside 0 to 7"),
        (lambda t: t["layers.0.blocks"].fill_(-2), "layer 0: a block below -1"),
        (lambda t: t.update({"layers.4.kept": torch.ones(T, 2, dtype=torch.bool)}), "layer 4: kept does not fit"),
        (lambda t: t.update({"layers.1.experts": torch.zeros(10, 2, dtype=torch.int8)}), r"layer 1: experts of \[10"),
        (lambda t: t.update({"about": about(tokens="many")}), "damaged record of choices"),
        (lambda t: t.update({"about": about(experts=3)}), "damaged record of choices"),
        (lambda t: t.update({"about": torch.tensor([1, 2], dtype=torch.uint8)}), "JSON"),
    ],
)
def test_damage_is_refused(tmp_path, change, what):
    with pytest.raises(CheckpointError, match=what):
        damaged(tmp_path, change)
