"""Eyes on a step: which dtypes tensors were held and multiplied in, against what the policy declares.

What is seen has two sources. Tensors that modules hand on are added by hooks; products are met below autograd, where
casts have happened, so a matrix is followed through its casts and views to the product that takes it. The formats of
an FP8 product are those of the operands that reach it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sextant.axes.numerics import blocks, delayed
from sextant.axes.numerics.base import DTYPES
from sextant.kernels.fp8 import Scaled

Kind = Literal["forward", "data gradient", "weight gradient"]
Pair = tuple[str, str]


class Seen:
    """Dtypes met by what was looked at, and the places where each was met."""

    def __init__(self) -> None:
        self.met: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(self, what: str, where: str, *tensors: Tensor | None) -> None:
        """Tensors of one place; None is skipped."""
        for tensor in tensors:
            if tensor is not None:
                self.note(what, where, dtype_name(tensor.dtype))

    def note(self, what: str, where: str, dtype: str) -> None:
        """A dtype by its short name."""
        places = self.met[what][dtype]
        if where not in places:
            places.append(where)


@dataclass(frozen=True)
class Line:
    """One line of an audit.

    Attributes:
        tensor: what was looked at.
        declared: the dtype that the policy says; ``a or b`` where both will do.
        met: dtypes met, most places first; empty where the model has no such tensor.
        reason: why it is declared so.
        broken: ``place (dtype)`` wherever another dtype was met.
    """

    tensor: str
    declared: str
    met: tuple[str, ...]
    reason: str
    broken: tuple[str, ...]


def line(seen: Seen, what: str, declared: str, reason: str) -> Line:
    """What was seen of one thing, judged."""
    met, fine = dict(sorted(seen.met.get(what, {}).items(), key=lambda item: -len(item[1]))), declared.split(" or ")
    broken = tuple(f"{where} ({dtype})" for dtype, places in met.items() if dtype not in fine for where in places)
    return Line(what, declared, tuple(met), reason, broken)


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16`` for ``torch.bfloat16``."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def pair_name(pair: Sequence[str]) -> str:
    """Both operands; once where they are alike."""
    return pair[0] if pair[0] == pair[1] else " by ".join(pair)


_PRODUCTS = {"mm", "mv", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul", "_grouped_mm", "grouped_mm"}


class ProductWatch(TorchDispatchMode):
    """Records the operands of every product that takes one of the named matrices, forward and backward.

    A weight gradient takes no matrix: it is known by the node of the graph that also forms the data gradient.
    """

    def __init__(self, named: Mapping[str, Tensor]):
        super().__init__()
        self.met: dict[str, dict[Kind, set[Pair]]] = defaultdict(lambda: defaultdict(set))
        self.softmaxes: list[Tensor] = []
        self._names = {_memory(tensor): name for name, tensor in named.items()}
        self._alive: list[object] = []  # neither memory nor nodes may be used again under an old address
        self._owners: dict[int, set[str]] = defaultdict(set)
        self._orphans: list[tuple[int, Pair]] = []
        self._formats: list[Pair] = []
        self._open = ExitStack()

    def __enter__(self) -> ProductWatch:
        for module, function in ((delayed, "rows_product"), (blocks, "rows_product"), (blocks, "columns_product")):
            self._open.enter_context(in_front(module, function, self._scaled))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()
        for node, pair in self._orphans:
            for name in self._owners[node]:
                self.met[name]["weight gradient"].add(pair)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._formats.clear()
        out = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        name = func.overloadpacket.__name__
        if func.namespace == "sextant":
            self._product(name, tensors[:2], self._formats[:1] or [_plain(name, tensors)])
        elif name in _PRODUCTS and len(tensors) >= 2:
            self._product(name, tensors[-2:], [(dtype_name(tensors[-2].dtype), dtype_name(tensors[-1].dtype))])
        elif name == "_softmax":
            self.softmaxes.append(tensors[0])
        elif tensors and isinstance(out, Tensor) and out.numel() == tensors[0].numel():
            self._follow(tensors[0], out)
        return out

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        """A cast or copy of a matrix is that matrix."""
        name = self._names.get(_memory(source))
        if name is not None and _memory(copy) not in self._names:
            self._names[_memory(copy)] = name
            self._alive.append(copy)

    def _product(self, op: str, operands: list[Tensor], pairs: list[Pair]) -> None:
        names = {self._names[_memory(x)] for x in operands if _memory(x) in self._names}
        node = torch._C._current_autograd_node()
        for pair in pairs:
            if names and not op.endswith("_dw"):
                kind: Kind = "forward" if node is None else "data gradient"
                for name in names:
                    self.met[name][kind].add(pair)
            elif node is not None:
                self._orphans.append((hash(node), pair))
        if node is not None:
            self._alive.append(node)
            self._owners[hash(node)] |= names

    def _scaled(self, args: tuple[Any, ...], out: object) -> None:
        left, right = (arg for arg in args[:2] if isinstance(arg, Scaled))
        self._formats.append((dtype_name(left.values.dtype), dtype_name(right.values.dtype)))


def _plain(op: str, operands: list[Tensor]) -> Pair:
    """A product of ours without FP8: matrices are cast to the dtype of the rows."""
    left = dtype_name(operands[0].dtype)
    return (left, dtype_name(operands[1].dtype)) if op.endswith("_dw") else (left, left)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def in_front(owner: Any, name: str, look: Callable[[tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Show ``look`` the arguments and the result of every call of a function or method, for a while."""
    plain = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        look(args, out)
        return out

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, plain)
