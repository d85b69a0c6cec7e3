"""Text from a model: prefill every prompt in one ragged stream, then decode all answers together, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sextant.axes.numerics import AnyNumerics, EightBit, EightBitKind, eight_bit, is_training_state
from sextant.axes.stability import Joins, Linear, Role, hidden_matrices, roles
from sextant.core import tensorfile
from sextant.core.errors import CheckpointError, UsageError
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.data.tokenizer import Tokenizer
from sextant.model.transformer import Transformer
from sextant.serve.sampling import Sampling, choose
from sextant.serve.text import Answer, FinishReason
from sextant.train import checkpoint
from sextant.train.loop import to_stderr
from sextant.train.run import Run

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Result:
    """One finished answer.

    Attributes:
        text: without the stop string, without control tokens.
        tokens: every sampled id, an end-of-text and the tokens of a stop string included.
        finish_reason: ``stop`` (a stop string), ``eot`` (the model ended the text) or ``length``.
        prompt_tokens: ids that the prompt took.
        seed: what the draws were keyed by; the same seed repeats them.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class Weights:
    """Parameters of a model and the bytes that they take in memory."""

    count: int = 0
    held_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Memory that several parameters share is counted once."""
        held, parameters = {}, list(model.parameters())
        for parameter in parameters:
            if isinstance(parameter, EightBit):
                held[id(parameter)] = parameter.held_bytes
            else:
                memory = parameter.untyped_storage()
                held[memory.data_ptr()] = memory.nbytes()
        return cls(sum(parameter.numel() for parameter in parameters), sum(held.values()))

    @property
    def bytes_each(self) -> float:
        """Bytes per parameter."""
        return self.held_bytes / max(1, self.count)


@dataclass
class Stats:
    """What the last call took; ``state_bytes`` is the most that decoding states held, ``weights`` what the model's
    parameters are and hold.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    state_bytes: int = 0
    weights: Weights = Weights()
    decoded_tokens: int = field(default=0, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding; the first token of each answer belongs to the prefill."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Batch:
    """Sequences that are decoded together: their states, and the logits ``[B, P]`` after each one's last token.

    Args:
        prompts: token ids, none empty; all are prefilled in one ragged stream.
        copies: how many times each prompt is continued.
        vocab: ids that may be sampled; a model can have more rows than its tokenizer has ids.
    """

    def __init__(self, model: Transformer, prompts: Sequence[list[int]], copies: int = 1, vocab: int | None = None):
        self.model, self.vocab = model, vocab
        self.device = model.embedding.weight.device
        self.memory = model.memory(len(prompts))
        self.logits_BP = self._forward([token for ids in prompts for token in ids], [len(ids) for ids in prompts])
        if copies > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(copies)])
            self.logits_BP = self.logits_BP.repeat_interleave(copies, 0)

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences only; a row named twice goes on twice."""
        self.memory.keep(rows)

    def advance(self, tokens: list[int]) -> None:
        """One more token for every sequence."""
        self.logits_BP = self._forward(tokens, [1] * len(tokens))

    def _forward(self, tokens: list[int], lengths: list[int]) -> Tensor:
        stream = Stream.of_lengths(lengths, self.device, self.memory)
        hidden_TD = self.model(torch.tensor(tokens, device=self.device), stream).hidden_TD
        if stream.max_len > 1:
            hidden_TD = hidden_TD[stream.cu_seqlens[1:] - 1]
        return self.model.logits(hidden_TD)[:, : self.vocab]


@torch.inference_mode()
def decode_tokens(model: Transformer, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """The likeliest ``new`` tokens after each prompt, chosen one by one, without text or stop rules."""
    batch, greedy = Batch(model, prompts), [Sampling(temperature=0)] * len(prompts)
    steps = [choose(batch.logits_BP, greedy, [0.0] * len(prompts))]
    while len(steps) < new:
        batch.advance(steps[-1])
        steps.append(choose(batch.logits_BP, greedy, [0.0] * len(prompts)))
    return [list(tokens) for tokens in zip(*steps, strict=True)]


class Generator:
    """Writes with a model. ``stats`` describes the last call.

    Raises:
        UsageError: by every call, for a prompt that the context cannot hold or ids outside the vocabulary.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.vocab = min(tokenizer.vocab_size, model.spec.vocab)
        self.weights = Weights.of(model)
        self.stats = Stats(weights=self.weights)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None, n: int = 1) -> list[Result]:
        """``n`` answers to each prompt, in the order of the prompts; the answers to one prompt share its prefill."""
        ids = [self._ids(prompt) for prompt in prompts]
        answers = [self._answer(own, sampling or Sampling(), choice) for own in ids for choice in range(n)]
        texts: dict[int, list[str]] = {id(answer): [] for answer in answers}
        for step in self._steps(ids, answers, n):
            for answer, text in step:
                texts[id(answer)].append(text)
        lengths = [len(own) for own in ids for _ in range(n)]
        return [
            Result("".join(texts[id(answer)]), answer.tokens, answer.finish_reason or "length", length, answer.seed)
            for answer, length in zip(answers, lengths, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, choice: int = 0) -> Iterator[str]:
        """Pieces of one answer as they become certain; joined they are the answer ``choice`` of :meth:`generate`."""
        ids = self._ids(prompt)
        for step in self._steps([ids], [self._answer(ids, sampling or Sampling(), choice)], 1):
            for _, text in step:
                if text:
                    yield text

    def _ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; an empty one starts a new document."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids or [self.tokenizer.eot_id]
        context = self.model.spec.context
        if len(ids) >= context:
            raise UsageError(
                "the prompt fills the context", where="prompt", got=f"{len(ids)} tokens",
                expected=f"below {context}", fix="Shorten it",
            )
        if min(ids) < 0 or max(ids) >= self.vocab:
            outside = next(i for i in ids if not 0 <= i < self.vocab)
            raise UsageError(
                "token id outside the vocabulary", where="prompt", got=outside, expected=f"0 to {self.vocab - 1}"
            )
        return ids

    def _answer(self, ids: list[int], sampling: Sampling, choice: int) -> Answer:
        return Answer(ids, sampling, self.tokenizer, self.model.spec.context - len(ids), choice)

    @torch.inference_mode()
    def _steps(self, prompts: list[list[int]], answers: list[Answer], n: int) -> Iterator[list[tuple[Answer, str]]]:
        """Each step gives every unfinished answer one token and yields the text that this makes certain."""
        self.stats = stats = Stats(prompt_tokens=sum(map(len, prompts)), weights=self.weights)
        if not answers:
            return
        began = time.perf_counter()
        batch = Batch(self.model, prompts, n, self.vocab)
        while True:
            tokens = choose(batch.logits_BP, [a.sampling for a in answers], [a.uniform() for a in answers])
            step = [(answer, answer.take(token)) for answer, token in zip(answers, tokens, strict=True)]
            rows = [row for row, answer in enumerate(answers) if answer.finish_reason is None]
            self._count(stats, batch.memory, len(answers), len(rows), time.perf_counter() - began)
            yield step
            if not rows:
                return
            began = time.perf_counter()
            if len(rows) < len(answers):
                batch.keep(rows)
                answers = [answers[row] for row in rows]
            batch.advance([answer.tokens[-1] for answer in answers])

    @staticmethod
    def _count(stats: Stats, memory: Memory, new: int, left: int, seconds: float) -> None:
        if stats.new_tokens:
            stats.decode_seconds += seconds
            stats.decoded_tokens += new
        else:
            stats.prefill_seconds = seconds
        stats.new_tokens += new
        if left < new:  # states only shrink when answers leave
            stats.state_bytes = max(stats.state_bytes, memory.nbytes)


def sampler(model: Transformer, tokenizer: Tokenizer, prompt: str, max_tokens: int = 64) -> str:
    """The prompt and its continuation, for a look at a model in training; leaves its mode as it was.

    The draws have a fixed seed, so that samples of two steps differ by the model alone.
    """
    was_training = model.training
    with _not_compiled():
        sampling = Sampling(temperature=0.8, max_tokens=max_tokens, seed=0)
        answer = Generator(model, tokenizer).generate([prompt], sampling)
    model.train(was_training)
    return prompt + answer[0].text


def _not_compiled() -> AbstractContextManager[object]:
    """Run compiled blocks as written: decoding meets a new shape at every token, and each would be compiled."""
    # What was never imported has compiled nothing, and takes seconds to import.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# --- loading --------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, device: torch.device | str = "cpu", numerics: AnyNumerics | None = None,
    weights: EightBitKind | None = None, say: Callable[[str], None] = to_stderr,
) -> tuple[Transformer, Tokenizer, Run]:
    """A trained model, its tokenizer, and the run that made it.

    Args:
        path: a run folder (its newest checkpoint that verifies) or one checkpoint folder ``step-XXXXXXXX`` inside it.
        device: where the model goes.
        numerics: dtype policy; the run's own when None. Under bf16, matrices are cast once, here.
        weights: hold hidden matrices in 8 bits: about half of bf16's memory, at the price of restoring them each time.
        say: gets a line for each newer checkpoint that is passed over.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one that belongs to another tokenizer or model.
    """
    folder, found, manifest = _locate(Path(path), say)
    run = Run.load(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    _require_tokenizer(manifest, tokenizer, folder)
    model = Transformer(run.model, (numerics or run.numerics).serving)
    tensors = tensorfile.read(found / "model.safetensors", device)
    tensors = {name: tensor for name, tensor in tensors.items() if not is_training_state(name)}
    checkpoint.require_tensors(tensors, model.state_dict(), found.name)
    bad = tensorfile.first_non_finite(tensors)
    if bad is not None:
        raise CheckpointError("NaN or infinity in a weight", where=f"{found.name}/{bad}", fix="Use an older step")
    model.load_state_dict(tensors, assign=True)
    return lower_weights(model.to(device), weights).eval(), tokenizer, run


def lower_weights(model: Transformer, weights: EightBitKind | None = None) -> Transformer:
    """Freeze a model for decoding: matrices in the compute dtype, and one product where several read the same rows; or
    hidden matrices in 8 bits, each by itself.
    """
    model.requires_grad_(False)
    if model.numerics.compute is not None:
        _cast_products(model, model.numerics.compute)
    if weights is not None:
        return _hold_in_eight_bits(model, weights)
    for module in list(model.modules()):
        if isinstance(module, Joins):
            module.join()
    return model


def _cast_products(model: Transformer, dtype: torch.dtype) -> None:
    """Cast the matrices that products cast anyway, once; embedding, router, norms and biases stay as they are.

    A tied model gets a head of its own, because rows are looked up in fp32 and multiplied in the compute dtype.
    """
    if model.head is None:
        model.head = Linear(model.spec.width, model.spec.vocab, Role.HEAD)
        model.head.weight = nn.Parameter(model.embedding.weight.detach(), requires_grad=False)
    names = {name for name, role in roles(model).items() if role in _PRODUCTS}
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data = parameter.data.to(dtype)


def _hold_in_eight_bits(model: Transformer, kind: EightBitKind) -> Transformer:
    for name in hidden_matrices(model):
        owner, _, attribute = name.rpartition(".")
        matrix = model.get_parameter(name).detach()
        small = nn.Parameter(eight_bit(matrix, kind, matrix.dtype), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, small)
    return model


_PRODUCTS = {Role.HEAD, Role.ATTENTION_IN, Role.ATTENTION_OUT, Role.FF_IN, Role.FF_OUT}


def _locate(path: Path, say: Callable[[str], None]) -> tuple[Path, Path, dict[str, Any]]:
    """Run folder, checkpoint folder and its verified manifest.

    Raises:
        CheckpointError: nothing there that can be loaded.
    """
    root = path / "checkpoints"
    if not root.is_dir():
        manifest = checkpoint.verify(path)
        return path.resolve().parent.parent, path, manifest
    faults = [CheckpointError("no checkpoint yet", where=root, fix="Train first: sextant train")]
    for step in reversed(checkpoint.steps(root)):
        found = root / f"step-{step:08d}"
        try:
            manifest = checkpoint.verify(found)
        except CheckpointError as error:
            faults.append(error)
            continue
        for fault in faults[1:]:
            say(f"skipped: {fault.line()}")
        return path, found, manifest
    raise faults[-1]


def _require_tokenizer(manifest: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    saved = manifest["identity"].get("tokenizer")
    if saved != tokenizer.digest:
        raise CheckpointError(
            "tokenizer.json is not the one that the checkpoint was trained with", where=folder / "tokenizer.json",
            got=tokenizer.digest[:12], expected=str(saved)[:12], fix="Put the right file back",
        )
