"""Text from a checkpoint of any layout, one token at a time, with a key-value cache."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import InputError, TrainshortError
from data_pipeline.tokenizer import Tokenizer
from training.checkpoint.read import open_checkpoint
from training.model.cache import KeyValueCache
from training.model.single import load_single

SEEDS = 2**64  # what torch's generator takes
PREFILL_TOKENS = 4096  # of a prompt, in one pass: longer ones go through in parts, so that memory stays bounded


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Of the draws.

    Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"--temperature must be 0 or more, got {self.temperature}: 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}: 1 draws from all tokens")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"--seed must be from 0 to {SEEDS - 1}, got {self.seed}: write --seed 1")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(f"--top-p {self.top_p} draws, but --temperature is 0: add --temperature 1 or drop it")


@dataclass(frozen=True)
class Generated:
    """A prompt and what followed.

    Attributes:
        prompt: As given.
        text: Prompt and continuation.
        prompt_tokens: Tokens of the prompt; an empty prompt is the start of a document, one token.
        tokens: New tokens, the end of the document not among them.
        token_ids: Their ids.
        ended: Whether the document ended before the number of tokens asked for.
        prefill_seconds: Time for the prompt, to the first new token.
        token_seconds: Mean time of each further token; None where there was none.
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


class NextToken(Protocol):
    """What generation asks of a model."""

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return [batch, vocab] fp32: logits of what follows tokens [batch, new] after those in the cache."""
        ...


def read_prompt(text: str | None, file: Path | None) -> str:
    """Return the prompt, given as text or as a file, `-` for standard input, of which the last line break is dropped.

    Raises:
        InputError: both are given or neither, or the file cannot be read.
    """
    if (text is None) == (file is None):
        given = "neither" if text is None else "both"
        raise InputError(f"--prompt TEXT or --prompt-file FILE must be given, got {given}: give one of them")
    if file is None:
        assert text is not None
        return text
    name = "standard input" if file == Path("-") else str(file)
    try:
        raw = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        return raw.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise InputError(f"--prompt-file {name} cannot be read ({error.strerror}): give a text file, or -") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name} is not UTF-8 at byte {error.start}: write it in UTF-8") from None


def generate_from_checkpoint(checkpoint: Path, *, prompt: str, tokens: int, sampling: Sampling) -> Generated:
    """Continue a prompt with a trained model.

    Args:
        checkpoint: A step folder of any layout, or a run folder for its newest.
        prompt: Text to continue; empty for the start of a document.
        tokens: New tokens at most; the end of the document may come earlier.
        sampling: How tokens are chosen.
    Raises:
        InputError: the checkpoint cannot be read, or tokens is below 1.
        TrainshortError: the model's logits are no numbers.
    """
    if tokens < 1:
        raise InputError(f"tokens to generate must be 1 or more, got {tokens}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt is not UTF-8 at character {error.start}: write it in UTF-8") from None
    opened = open_checkpoint(checkpoint)
    tokenizer = Tokenizer.load(opened.tokenizer)
    # Documents follow each other in training, so the end of one is where the next begins.
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    model = load_single(opened)
    stream = continue_tokens(model, ids, sampling=sampling, end=tokenizer.end_of_document)
    new, instants = [], [time.perf_counter()]
    for _, token in zip(range(tokens), stream, strict=False):
        instants.append(time.perf_counter())
        new.append(token)
    ended = bool(new) and new[-1] == tokenizer.end_of_document
    new = new[:-1] if ended else new
    return Generated(
        prompt=prompt,
        # Decoded together: a piece's bytes may be half a character.
        text=tokenizer.decode([*(ids if prompt else []), *new]),
        prompt_tokens=len(ids),
        tokens=len(new),
        token_ids=tuple(new),
        ended=ended,
        prefill_seconds=instants[1] - instants[0],
        token_seconds=(instants[-1] - instants[1]) / (len(instants) - 2) if len(instants) > 2 else None,
        train_length=opened.config.data.sequence_length,
    )


def continue_tokens(model: NextToken, ids: Sequence[int], *, sampling: Sampling, end: int | None) -> Iterator[int]:
    """Yield token after token that follow `ids`, without end unless the token `end` comes, which is the last one.

    Raises:
        TrainshortError: a logit is no number.
    """
    cache = KeyValueCache()
    generator = torch.Generator().manual_seed(sampling.seed)
    for part in torch.split(torch.tensor([list(ids)]), PREFILL_TOKENS, dim=1):
        logits = model.next_logits(part, cache)
    while True:
        token = choose(logits[0], sampling=sampling, generator=generator)
        yield token
        if token == end:
            return
        logits = model.next_logits(torch.tensor([[token]]), cache)


def choose(logits: Tensor, *, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token's id.

    Args:
        logits: [vocab].
        sampling: How to choose.
        generator: Where the draws come from.
    """
    if not bool(torch.isfinite(logits).all()):
        raise TrainshortError(
            "the model's logits are no numbers: its weights have diverged, take an earlier checkpoint"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In fp64 and from the largest down: a tiny temperature must not overflow.
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    likely, order = scaled.softmax(-1).sort(descending=True, stable=True)
    # A token stays while those before it have less than top_p; so the first always stays.
    kept = likely * (likely.cumsum(0) - likely < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
