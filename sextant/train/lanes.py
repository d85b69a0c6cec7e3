"""Micro-batches side by side on a CPU, each on a thread of its own with its share of the threads of products.

Threads that share one product wait for one another several hundred times a step, and the longer the farther apart
their cores are; threads with a micro-batch each wait twice (docs/design/side-by-side.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any, TypeVar

import torch

from sextant.axes.numerics import products
from sextant.core.stream import Stream
from sextant.model.transformer import Transformer

R = TypeVar("R")
PROBE = 16
"""Tokens of the forward that tells whether a model draws random numbers."""


class Lanes:
    """``count`` threads; with one, work is done by the caller with all threads of products."""

    def __init__(self, count: int):
        self.count, self._pool = count, None if count == 1 else _pool(count)

    def map(self, work: Callable[..., R], *items: Iterable[Any]) -> list[R]:
        """``work`` on each item, results in their order; the first error is raised when all have ended."""
        calls = list(zip(*items, strict=True))
        if self._pool is None or len(calls) == 1:
            return [work(*call) for call in calls]
        futures = [self._pool.submit(work, *call) for call in calls]
        wait(futures)
        return [future.result() for future in futures]


def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that share the caller's threads of products, all of them started."""
    threads, started = torch.get_num_threads(), Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "lane", _keep_to, (max(1, threads // count),))
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)  # a thread that sets its own number also sets that of threads to come
    return pool


def _keep_to(threads: int) -> None:
    torch.get_num_threads()  # a thread adopts the common number at its first use: have that behind us
    torch.set_num_threads(threads)


def lanes_for(model: Transformer, wanted: int) -> Lanes:
    """As many lanes as wanted where micro-batches may run at once, else one."""
    on_cpu = model.embedding.weight.device.type == "cpu"
    return Lanes(wanted if wanted > 1 and on_cpu and not remembers(model) and not draws(model) else 1)


def remembers(model: Transformer) -> bool:
    """Whether products keep a history that every forward adds to, as delayed scaling does."""
    return any(list(product.buffers()) for product in products(model))


def draws(model: Transformer) -> bool:
    """Whether a training forward draws random numbers: side by side, chance would say which are whose.

    Seen, not declared: a small forward, after which the generator has moved or not.
    """
    training, before = model.training, torch.get_rng_state()
    tokens = min(PROBE, model.spec.context)
    with torch.no_grad():
        model.train()(torch.arange(tokens) % model.spec.vocab, Stream.of_lengths([tokens]), ahead=True)
    moved = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    model.train(training)
    return moved
