"""``sextant chat``: a terminal conversation with a base model, as one text that both sides continue."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sextant.cli.frame import verb
from sextant.cli.generate import stats_line
from sextant.cli.sampling import (
    Device,
    Dtype,
    MaxTokens,
    MinP,
    Path_,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Weights,
    loaded,
    sampling_of,
)

if TYPE_CHECKING:
    from sextant.serve.generate import Generator
    from sextant.serve.sampling import Sampling

app = verb()

HELP = "/stats numbers of the last answer, /params settings (/params temperature=0.5 changes), /reset, /quit"


@app.command()
def chat(
    path: Path_,
    max_tokens: MaxTokens = "200",
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = None,
) -> None:
    """Talk to a trained model in the terminal; Ctrl-C stops an answer, Ctrl-D leaves."""
    sampling = sampling_of(max_tokens, temperature, top_k, top_p, min_p, seed, stop)
    model, tokenizer, run = loaded(path, device, dtype, weights)
    from sextant.serve.generate import Generator

    _say(f"{run.name}: a base model without a chat template; it continues the text that you begin.")
    _say(f"{HELP}. Ctrl-C stops an answer, Ctrl-D leaves.")
    Conversation(Generator(model, tokenizer), sampling).run()


class Conversation:
    """The text so far, and what a line of the user does to it. Each turn draws numbers of its own."""

    def __init__(self, generator: Generator, sampling: Sampling):
        self.generator, self.sampling, self.text, self.turn = generator, sampling, "", 0

    def run(self) -> None:
        """Until the input ends or the user leaves."""
        while (line := self._read()) is not None and line.strip() != "/quit":
            if line.startswith("/"):
                self._command(line.strip())
            else:
                self._answer(line)

    def _read(self) -> str | None:
        """A line without its end; None at the end of the input. Ctrl-C clears the line."""
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                _say("")

    def _answer(self, line: str) -> None:
        between = "\n" if self.text and not self.text.endswith("\n") else ""
        self.text, self.turn = self._fitting(self.text + between + line), self.turn + 1
        try:
            for piece in self.generator.stream(self.text, self.sampling, self.turn):
                print(piece, end="", flush=True)
                self.text += piece
        except KeyboardInterrupt:
            _say(" [stopped]")
        print(flush=True)

    def _fitting(self, text: str) -> str:
        """The end of the text that leaves room for an answer in the context."""
        context = self.generator.model.spec.context
        room = max(1, context - min(self.sampling.max_tokens, context // 2))
        ids = self.generator.tokenizer.encode(text)
        if len(ids) < room:
            return text
        _say(f"[the context holds {context} tokens: the oldest text is forgotten]")
        return self.generator.tokenizer.decode(ids[-(room - 1) :])

    def _command(self, line: str) -> None:
        from sextant.core.errors import UsageError

        name, _, rest = line.partition(" ")
        try:
            if name == "/stats":
                _say(stats_line(self.generator.stats))
            elif name == "/params":
                self.sampling = self.sampling.override(*rest.split())
                _say(" ".join(f"{key}={value}" for key, value in self.sampling.leaves().items()))
            elif name == "/reset":
                self.text, self.turn = "", 0
                _say("[empty]")
            else:
                _say(HELP)
        except UsageError as error:
            _say(f"error: {error.line()}")


def _say(line: str) -> None:
    """Words of the program, apart from those of the model."""
    print(line, file=sys.stderr, flush=True)
