"""Output of `generate`: the text while it is generated, its speed, and the prompt that stays open."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from configs.errors import InputError
from data_pipeline.reading import BYTE_ORDER_MARK
from launch.show.console import show_json, show_text
from launch.show.streams import write_error

if TYPE_CHECKING:
    from training.api import TrainedModel
    from training.generation import GeneratedText, TextStream
    from training.sampling import Sampling

logger = logging.getLogger(__name__)

_HOW = "a line is a prompt (empty: a new document); Ctrl-C stops a text, Ctrl-D ends"
_PROMPT = "> "


def show_stream(stream: "TextStream") -> None:
    """Write a text while it is generated and a line break, then its speed; end when the reader has gone."""
    try:
        for piece in stream:
            if not show_text(piece):
                break
    finally:  # also on Ctrl-C: what was generated can then be repeated too
        show_text("\n")
        show_speed(stream.result)


def show_generated(stream: "TextStream") -> None:
    """Write a text as one JSON document once it is whole, and its speed."""
    for _ in stream:
        pass
    show_json(asdict(stream.result))
    show_speed(stream.result)


def show_speed(generated: "GeneratedText") -> None:
    """Write the speed of a generation in one line on standard error, with the seed that repeats it."""
    if not generated.tokens and not generated.ended:
        return
    each = generated.token_seconds
    multiple = (generated.prompt_tokens + generated.tokens) / generated.train_length
    line = f"{generated.prompt_tokens} + {generated.tokens} tokens ({multiple:.3g} x trained)"
    line += f": {generated.prefill_seconds:.2f} s" + (f", then {1 / each:,.0f}/s" if each else "")
    line += "; ended" if generated.ended else ""
    logger.info("%s%s", line, "" if generated.seed is None else f"; --seed {generated.seed}")


def answer_prompts(model: "TrainedModel", *, tokens: int, sampling: "Sampling") -> None:
    """Read a prompt a line from standard input and write its continuation, until the input ends.

    On a terminal, Ctrl-C ends a continuation and the next prompt follows; Ctrl-C at a prompt ends the command.

    Args:
        model: The model.
        tokens: New tokens of a continuation at most.
        sampling: How tokens are sampled; each prompt has a seed of its own, counted up from this one's.
    Raises:
        InputError: a line is not UTF-8, or standard input is closed.
    """
    if sys.stdin is None:
        raise InputError("--interactive reads standard input, which is closed: open it, or use --prompt")
    logger.info(_HOW)
    for number, prompt in enumerate(_prompts()):
        each = sampling.of_prompt(number)
        stream = model.stream(prompt, tokens=tokens, temperature=each.temperature, top_p=each.top_p, seed=each.seed)
        if prompt:
            next(stream)  # it was just typed
        try:
            show_stream(stream)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise


def _prompts() -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, ask for each one."""
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # as data: UTF-8 in any locale, and only \n ends a line
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    if typed:
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  lets `input` edit lines and recall them
    # `input` writes its prompt to standard output, which may be a file.
    ours = typed and not sys.stdout.isatty()
    while True:
        if ours:
            write_error(_PROMPT)
        try:
            line = input(_PROMPT if typed and not ours else "")
        except (EOFError, KeyboardInterrupt) as end:
            if typed:
                write_error("\n")  # the shell's prompt begins a new line
            if isinstance(end, KeyboardInterrupt):
                raise
            return
        yield line.removesuffix("\r").removeprefix(BYTE_ORDER_MARK)
