"""Generate text one token at a time, with a key-value cache, and show it while it is generated."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import InputError, TrainshortError
from data_pipeline.tokenizer import Tokenizer
from training.model.cache import KeyValueCache
from training.sampling import Sampling, require_utf8, require_whole_number

PREFILL_TOKENS = 4096  # tokens of a prompt in one pass; split a longer prompt, so that memory stays bounded


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and its continuation; `str()` of it is the text.

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
        temperature: What the logits were divided by; 0 for the likeliest tokens.
        top_p: Share of the probability that tokens were drawn from.
        seed: Seed of the draws, which gives the same text again; None if nothing was drawn.
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
    temperature: float
    top_p: float
    seed: int | None

    def __str__(self) -> str:
        return self.text


class LanguageModel(Protocol):
    """A model that generation can run."""

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the next token, [batch, vocab] fp32, and add the tokens to the cache.

        Args:
            tokens: The tokens that follow those in the cache, [batch, new] int64.
            cache: Keys and values of the tokens before.
        """
        ...


class TextStream(Iterator[str]):
    """A text while it is generated: an iterator of its pieces, which are whole characters.

    The first piece is the prompt, unless it is empty. All pieces together are the text of `result`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        prompt: str,
        tokens: int,
        sampling: Sampling,
        train_length: int,
    ) -> None:
        """Encode the prompt; the model runs when pieces are asked for.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            prompt: Text to continue; empty for the start of a document.
            tokens: New tokens at most; generation stops at the end of the document.
            sampling: How tokens are sampled.
            train_length: Tokens that the model was trained at, for the result.
        Raises:
            InputError: the prompt is not text in UTF-8, or `tokens` is not a whole number from 1 up.
        """
        self._prompt = require_utf8(prompt, name="the prompt")
        tokens = require_whole_number(tokens, name="tokens to generate")
        if tokens < 1:
            raise InputError(f"tokens to generate must be 1 or more, got {tokens}")
        # Training data is documents separated by the end token, so that token also starts a document.
        self._ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._tokens, self._train_length = tokens, train_length
        self._new: list[int] = []  # with the end-of-document token
        self._seconds: list[float] = []  # of each new token
        self._pieces = self._generate()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> GeneratedText:
        """What has been generated so far: the whole text, once there are no more pieces."""
        ended = self._new[-1:] == [self._tokenizer.end_of_document]
        new = self._new[:-1] if ended else self._new
        first, *further = self._seconds or [0.0]
        return GeneratedText(
            prompt=self._prompt,
            text=self._prompt + self._tokenizer.decode(new),
            prompt_tokens=len(self._ids),
            tokens=len(new),
            token_ids=tuple(new),
            ended=ended,
            prefill_seconds=first,
            token_seconds=sum(further) / len(further) if further else None,
            train_length=self._train_length,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=None if self._sampling.greedy else self._sampling.seed,
        )

    def _generate(self) -> Iterator[str]:
        if self._prompt:
            yield self._prompt
        # A control piece has no text.
        yield from filter(None, self._tokenizer.decode_each(self._new_tokens()))

    def _new_tokens(self) -> Iterator[int]:
        """Yield the new tokens; time each one alone, without what the reader of the text does between two."""
        end = self._tokenizer.end_of_document
        stream = continue_tokens(self._model, self._ids, sampling=self._sampling, end=end)
        while len(self._new) < self._tokens:
            started = time.perf_counter()
            token = next(stream)
            self._seconds.append(time.perf_counter() - started)
            self._new.append(token)
            if token == end:
                return
            yield token


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
    if not sampling.greedy:
        logits = logits.cpu()  # where the generator draws
    # One read of both: each waits for the device.
    finite, likeliest = torch.stack([torch.isfinite(logits).all().long(), logits.argmax()]).tolist()
    if not finite:
        raise TrainshortError(
            "the model's logits are not finite: its weights have diverged, take an earlier checkpoint"
        )
    if sampling.greedy:
        return int(likeliest)
    # In fp64, and with the largest logit at 0, so that a tiny temperature cannot overflow.
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    probabilities = scaled.softmax(-1)
    # Sort few: tokens below this share together have less than half of what top_p leaves out.
    (candidates,) = torch.where(probabilities >= (1 - sampling.top_p) / (2 * len(logits)))
    likely, order = probabilities[candidates].sort(descending=True, stable=True)
    # Keep a token while the likelier ones sum to less than top_p. The first is always kept.
    kept = torch.zeros_like(probabilities)  # of all tokens, so that each draw takes the same number of random numbers
    kept[: len(likely)] = likely * (likely.cumsum(0) - likely < sampling.top_p)
    return int(candidates[order[torch.multinomial(kept, 1, generator=generator)]])
