"""Generate text from a checkpoint of any layout, one token at a time, with a key-value cache."""

import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import InputError, TrainshortError
from data_pipeline.reading import BYTE_ORDER_MARK
from data_pipeline.tokenizer import Tokenizer
from training.checkpoint.read import open_checkpoint
from training.model.cache import KeyValueCache
from training.model.single import load_single

SEED_LIMIT = 2**64  # torch's generator takes seeds below it
PREFILL_TOKENS = 4096  # tokens of a prompt in one pass; split a longer prompt, so that memory stays bounded


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens that has this probability.
        seed: Seed of the draws.

    Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"--temperature must be 0 or more, got {self.temperature}: 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}: 1 draws from all tokens")
        if not 0 <= self.seed < SEED_LIMIT:
            raise InputError(f"--seed must be from 0 to {SEED_LIMIT - 1}, got {self.seed}: write --seed 1")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(f"--top-p {self.top_p} draws, but --temperature is 0: add --temperature 1 or drop it")


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and its continuation.

    Attributes:
        prompt: The prompt.
        text: Prompt and continuation.
        prompt_tokens: Tokens of the prompt; an empty prompt is one token, the start of a document.
        tokens: New tokens, without the end-of-document token.
        token_ids: Ids of the new tokens.
        ended: Whether the document ended before the requested number of tokens.
        prefill_seconds: Time to the first new token.
        token_seconds: Mean time of each further token; None if there was none.
        train_length: Tokens that the model was trained at.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    token_ids: tuple[int, ...]
    ended: bool
    prefill_seconds: float
    token_seconds: float | None
    train_length: int


class LanguageModel(Protocol):
    """A model that generation can run."""

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the next token, [batch, vocab] fp32, and add the tokens to the cache.

        Args:
            tokens: The tokens that follow those in the cache, [batch, new] int64.
            cache: Keys and values of the tokens before.
        """
        ...


def read_prompt(text: str | None, file: Path | None) -> str:
    r"""Return the prompt, from text or a file, as training reads text: verbatim, but for a byte order mark before it.

    Args:
        text: The prompt itself; None if it is in a file.
        file: A file, or `-` for standard input; its last line break, \n or \r\n, is dropped.
    Raises:
        InputError: both are given or neither, or the file cannot be read.
    """
    if (text is None) == (file is None):
        given = "neither" if text is None else "both"
        raise InputError(f"--prompt TEXT or --prompt-file FILE must be given, got {given}: give one of them")
    if file is None:
        assert text is not None
        return text.removeprefix(BYTE_ORDER_MARK)
    name = "standard input" if file == Path("-") else str(file)
    try:
        raw = _read_standard_input() if file == Path("-") else file.read_bytes()
        return re.sub(r"\r?\n\Z", "", raw.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except OSError as error:
        raise InputError(f"--prompt-file {name} cannot be read ({error.strerror}): give a text file, or -") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name} is not UTF-8 at byte {error.start}: write it in UTF-8") from None


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise OSError(None, "it is closed")
    return sys.stdin.buffer.read()


def generate_from_checkpoint(checkpoint: Path, *, prompt: str, tokens: int, sampling: Sampling) -> GeneratedText:
    """Continue a prompt with a trained model.

    Args:
        checkpoint: A step folder of any layout, or a run folder for its newest checkpoint.
        prompt: Text to continue; empty for the start of a document.
        tokens: New tokens at most; generation stops at the end of the document.
        sampling: How tokens are sampled.
    Raises:
        InputError: the checkpoint cannot be read, the prompt is not UTF-8, or tokens is below 1.
        TrainshortError: the model's logits are not finite.
    """
    if tokens < 1:
        raise InputError(f"tokens to generate must be 1 or more, got {tokens}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt is not UTF-8 at character {error.start}: write it in UTF-8") from None
    opened = open_checkpoint(checkpoint)
    tokenizer = Tokenizer.load(opened.tokenizer)
    # Training data is documents separated by the end token, so that token also starts a document.
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    model = load_single(opened)
    stream = continue_tokens(model, ids, sampling=sampling, end=tokenizer.end_of_document)
    new, times = [], [time.perf_counter()]
    # The range comes first: zip would otherwise generate one more token before it stops.
    for _, token in zip(range(tokens), stream, strict=False):
        times.append(time.perf_counter())
        new.append(token)
    ended = bool(new) and new[-1] == tokenizer.end_of_document
    new = new[:-1] if ended else new
    return GeneratedText(
        prompt=prompt,
        # Decode all ids at once: a token may be one byte of a character.
        text=tokenizer.decode([*(ids if prompt else []), *new]),
        prompt_tokens=len(ids),
        tokens=len(new),
        token_ids=tuple(new),
        ended=ended,
        prefill_seconds=times[1] - times[0],
        token_seconds=(times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None,
        train_length=opened.config.data.sequence_length,
    )


def continue_tokens(model: LanguageModel, ids: Sequence[int], *, sampling: Sampling, end: int | None) -> Iterator[int]:
    """Yield the tokens that follow a prompt, endlessly, or until the end-of-document token, which is yielded too.

    Args:
        model: The model.
        ids: Token ids of the prompt, at least one.
        sampling: How tokens are sampled.
        end: The end-of-document token; None to ignore it.
    Raises:
        TrainshortError: a logit is not finite.
    """
    cache = KeyValueCache()
    generator = torch.Generator().manual_seed(sampling.seed)
    # ids [1, prompt tokens]; after the last part, `logits` are for the first new token
    for part in torch.split(torch.tensor([list(ids)]), PREFILL_TOKENS, dim=1):
        logits = model.next_logits(part, cache)
    while True:
        token = sample_token(logits[0], sampling=sampling, generator=generator)
        yield token
        if token == end:
            return
        logits = model.next_logits(torch.tensor([[token]]), cache)


def sample_token(logits: Tensor, *, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id of the next token.

    Args:
        logits: Logits of the next token, [vocab].
        sampling: How to sample.
        generator: Random generator of the draws.
    Raises:
        TrainshortError: a logit is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise TrainshortError(
            "the model's logits are not finite: its weights have diverged, take an earlier checkpoint"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In fp64, and with the largest logit at 0, so that a tiny temperature cannot overflow.
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    likely, order = scaled.softmax(-1).sort(descending=True, stable=True)
    # Keep a token while the likelier ones sum to less than top_p. The first is always kept.
    kept = likely * (likely.cumsum(0) - likely < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
