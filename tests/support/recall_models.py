"""Models whose recall is known: one that reads the answer from its context, one that knows nothing."""

import re
from functools import cache

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from training.model.cache import KeyValueCache

_NEEDLE = re.compile(r"The (pass key|code of (\w+)) is (\d+)\.\n")
_ASKED = re.compile(r"The (?:pass key is|codes? of ([\w, ]+?) (?:is|are))(?=[ \d,.]*$)")
SURE = 20.0  # logit of the token that a model is sure of


class ReadingModel:
    """A model that looks up what a question asks for among its last tokens, and is sure of it."""

    certificate = {"ranks": [{"position": "alibi", "backend": "sdpa", "precision": "fp32"}]}  # noqa: RUF012

    def __init__(self, tokenizer: Tokenizer, *, sees: int | None = None) -> None:
        """Build it.

        Args:
            tokenizer: Its tokenizer.
            sees: How many of the last tokens it sees; None for all.
        """
        self._tokenizer, self._sees = tokenizer, sees
        self._encode = cache(tokenizer.encode)
        self._ids: Tensor = torch.empty(0)
        self.largest = 0  # tokens of a call

    def fit_length(self, length: int) -> None:
        """Do nothing: it reads at any length."""

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last, [batch, vocab]."""
        return self.logits(tokens, cache, last=1)[:, -1]

    def logits(self, tokens: Tensor, cache: KeyValueCache, *, last: int = 0) -> Tensor:
        """Return the logits after each token, or the last ones, [batch, new, vocab]."""
        self.largest = max(self.largest, tokens.numel())
        before = cache.length
        self._ids = tokens if before == 0 else torch.cat([self._ids[:, :before], tokens], dim=1)
        cache.advance(tokens.shape[1])
        ends = range(before + 1, cache.length + 1)[-last:]
        return torch.stack([torch.stack([self._after(row[:end].tolist()) for end in ends]) for row in self._ids])

    def _after(self, ids: list[int]) -> Tensor:
        logits = torch.zeros(self._tokenizer.vocab_size)
        seen = ids if self._sees is None else ids[-self._sees :]
        answer = self._answer(self._tokenizer.decode(seen))
        given = next((n for n in range(len(answer), 0, -1) if ids[-n:] == answer[:n]), 0)
        if given < len(answer):
            logits[answer[given]] = SURE
        return logits

    def _answer(self, text: str) -> list[int]:
        """Return the token ids of the answer to the question that a text ends with; none if it is not in the text."""
        asked = _ASKED.search(text[-400:])
        if asked is None:
            return []
        keys = re.split(r", | and ", asked[1]) if asked[1] else [""]
        values = [value for key in keys for _, owner, value in _NEEDLE.findall(text) if owner == key]
        ends = ["," for _ in values[1:]] + [".\n"]
        return [token for value, end in zip(values, ends, strict=False) for token in self._encode(f" {value}{end}")]


class KnowsNothing(ReadingModel):
    """A model for which every token is equally likely, with a logit of your choice."""

    def __init__(self, tokenizer: Tokenizer, *, logit: float = 0.0) -> None:
        super().__init__(tokenizer)
        self._logits = torch.full((tokenizer.vocab_size,), logit)

    def _after(self, ids: list[int]) -> Tensor:
        return self._logits
