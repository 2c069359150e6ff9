"""Ask a model the questions of prompts: what it generates, and how likely the right numbers are among wrong ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import TrainshortError
from data_pipeline.tokenizer import Tokenizer
from training.generation import PREFILL_TOKENS
from training.model.cache import KeyValueCache
from training.retrieval.prompts import CANDIDATES, Prompt

CHANCE = 1 / CANDIDATES  # of `PromptScore.choice`, for a model that knows nothing


class RetrievalModel(Protocol):
    """A model that can be asked."""

    def fit_length(self, length: int) -> None:
        """Scale positions for prompts of a length if they follow it."""
        ...

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last, [batch, vocab], and add tokens [batch, new] to the cache."""
        ...

    def logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits after each token, [batch, new, vocab] on the CPU; add tokens [batch, new] to the cache."""
        ...


@dataclass(frozen=True)
class PromptScore:
    """What a model made of one prompt.

    Attributes:
        recall: Share of the asked numbers that it generated, taking the likeliest tokens: 0 or 1 for one number.
        choice: Share of the asked numbers that were likeliest among their candidates, the numbers before them given.
        log_probability: Mean log-probability of an asked number, in nats.
        margin: The same minus that of the wrong numbers, mean.
        generated: What it generated.
    """

    recall: float
    choice: float
    log_probability: float
    margin: float
    generated: str


def prompts_at_once(length: int) -> int:
    """Return how many prompts of a length are computed together, so that memory stays bounded."""
    return max(1, PREFILL_TOKENS // length)


def score_prompts(model: RetrievalModel, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[PromptScore]:
    """Return the scores of prompts of one task and length.

    Args:
        model: The model.
        prompts: The prompts, at most `prompts_at_once`.
        tokenizer: The model's tokenizer.
    Raises:
        TrainshortError: a logit is not finite.
    """
    cache, tokens = KeyValueCache(), _stacked([prompt.tokens for prompt in prompts])  # [batch, prompt]
    for part in torch.split(tokens, PREFILL_TOKENS, dim=1):
        logits = model.next_logits(part, cache)
    after = cache.length
    generated = _generate(model, logits, cache, tokens=prompts[0].answer_tokens)
    cache.cut(after)
    likely = _candidate_log_probabilities(model, logits, cache, prompts)  # [batch, answers, candidates]
    return [
        _score(prompt, tokenizer.decode(ids), each)
        for prompt, ids, each in zip(prompts, generated.tolist(), likely, strict=True)
    ]


def _score(prompt: Prompt, text: str, likely: Tensor) -> PromptScore:
    """Return the score of a prompt from what was generated and its candidates' log-probabilities."""
    numbers = set(re.findall(r"\d+", text))
    right, wrong = likely[:, :1], likely[:, 1:]
    # A tie is decided by lot, or a model for which all are equally likely would always be right.
    ties = 1 + (wrong == right).sum(1)
    chosen = (right >= wrong).all(1) / ties
    return PromptScore(
        recall=sum(value in numbers for value in prompt.values) / len(prompt.values),
        choice=float(chosen.mean()),
        log_probability=float(right.mean()),
        margin=float(right.mean() - wrong.mean()),
        generated=text,
    )


def _generate(model: RetrievalModel, logits: Tensor, cache: KeyValueCache, *, tokens: int) -> Tensor:
    """Return the likeliest tokens, one after the other, [batch, tokens]; `logits` are those of the first."""
    ids = [logits.argmax(1, keepdim=True)]  # they stay on the device: to read one would wait for it
    while len(ids) < tokens:
        ids.append(model.next_logits(ids[-1], cache).argmax(1, keepdim=True))
    return torch.cat(ids, dim=1)


def _candidate_log_probabilities(
    model: RetrievalModel, logits: Tensor, cache: KeyValueCache, prompts: Sequence[Prompt]
) -> Tensor:
    """Return the log-probability of each candidate, the right ones before it given, [batch, answers, candidates]."""
    answers = [_stacked(each) for each in zip(*(prompt.candidates for prompt in prompts), strict=True)]
    slots = list[Tensor]()
    for slot, candidates in enumerate(answers):  # [batch, candidates, width]
        if slot:
            logits = model.next_logits(answers[slot - 1][:, 0], cache)  # of what follows the right number before
        first, start = _log_probabilities(logits.cpu()), cache.length
        each = list[Tensor]()
        for tokens in candidates.unbind(1):  # [batch, width]
            known = first[:, None]
            if tokens.shape[1] > 1:
                known = torch.cat([known, _log_probabilities(model.logits(tokens[:, :-1], cache))], dim=1)
                cache.cut(start)
            each.append(known.gather(2, tokens[..., None]).sum((1, 2)))
        slots.append(torch.stack(each, dim=1))
    return torch.stack(slots, dim=1)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return them in fp64, [..., vocab]."""
    likely = logits.double().log_softmax(-1)
    if not torch.isfinite(likely).all():
        raise TrainshortError(
            "the model's logits are not finite: its weights have diverged, take an earlier checkpoint"
        )
    return likely


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
