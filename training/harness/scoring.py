"""Log-likelihoods of continuations: in batches, and a context that several continuations share is computed once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from configs.errors import InputError, TrainshortError
from training.model.cache import KeyValueCache

# The contexts of a batch are at least this share of its longest one: they are computed up to the shortest one's end.
_EVEN = 0.75


class TokenPair(NamedTuple):
    """A context, at least one token, and the continuation to score."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class PairScore(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest one."""

    log_likelihood: float
    is_greedy: bool


class PairScorer(Protocol):
    """A model that can score pairs; see `training.model.single.SingleModel`."""

    @property
    def batch_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor: ...

    def score(self, tokens: Tensor, where: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ScoredRow:
    """The tokens of a pair, cut to what the model is given.

    Attributes:
        number: Which pair it is.
        tokens: Context and continuation.
        scored: How many of the last ones are the continuation.
    """

    number: int
    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class RowGroup:
    """Rows that begin with the same `shared` tokens."""

    shared: int
    rows: tuple[ScoredRow, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


def score_pairs(
    model: PairScorer, pairs: Sequence[TokenPair], *, max_length: int, progress: Callable[[int], None] | None = None
) -> list[PairScore]:
    """Return the score of each pair.

    Args:
        model: The model.
        pairs: What to score.
        max_length: Inputs of the model at most: a longer context loses its beginning.
        progress: Called after each pass with the number of tokens that it has scored or read.
    Raises:
        InputError: a continuation is longer than that.
        TrainshortError: a log-likelihood is not finite.
    """
    rows = [cut_pair(number, pair, max_length=max_length) for number, pair in enumerate(pairs)]
    scores: dict[int, PairScore] = {}
    for batch in plan_batches(rows, batch_tokens=model.batch_tokens, cached_tokens=model.cached_tokens):
        scores |= _score_batch(model, batch)
        if progress is not None:
            progress(sum(len(row.tokens) for group in batch for row in group.rows))
    return [scores[number] for number in range(len(pairs))]


def cut_pair(number: int, pair: TokenPair, *, max_length: int) -> ScoredRow:
    """Return the row of a pair: its last tokens, of which all but the last one are inputs.

    Raises:
        InputError: the continuation is empty, or has more tokens than inputs are allowed.
    """
    if not 0 < len(pair.continuation) <= max_length:
        raise InputError(
            f"a continuation has {len(pair.continuation)} tokens, and 1 to {max_length} are possible: use a longer "
            "--max-length"
        )
    return ScoredRow(number, (*pair.context, *pair.continuation)[-(max_length + 1) :], len(pair.continuation))


def plan_batches(rows: Iterable[ScoredRow], *, batch_tokens: int, cached_tokens: int) -> Iterator[tuple[RowGroup, ...]]:
    """Yield batches of rows, which have about the same length.

    Args:
        rows: The rows.
        batch_tokens: Tokens of a batch that shares nothing, padding included.
        cached_tokens: The same where the contexts are computed once.
    """
    by_context: dict[tuple[int, ...], list[ScoredRow]] = {}
    for row in rows:
        by_context.setdefault(row.tokens[: -row.scored], []).append(row)
    alone: list[RowGroup] = []
    sharing: list[RowGroup] = []
    for context, same in by_context.items():
        # the context's last token is an input of each row, which predicts the row's first token
        shared = len(context) - 1
        if len(same) == 1 or not shared:
            alone += [RowGroup(0, (row,)) for row in same]
            continue
        most = max(1, cached_tokens // max(len(row.tokens) for row in same))
        sharing += [RowGroup(shared, tuple(same[first : first + most])) for first in range(0, len(same), most)]
    yield from _packed(alone, tokens=batch_tokens)
    yield from _packed(sharing, tokens=cached_tokens)


def _packed(groups: list[RowGroup], *, tokens: int) -> Iterator[tuple[RowGroup, ...]]:
    batch: list[RowGroup] = []
    count = longest = 0
    for group in sorted(groups, key=lambda group: (-group.shared, -group.longest)):
        count, longest = count + len(group.rows), max(longest, group.longest)
        if batch and (count * longest > tokens or group.shared < _EVEN * batch[0].shared):
            yield tuple(batch)
            batch, count, longest = [], len(group.rows), group.longest
        batch.append(group)
    if batch:
        yield tuple(batch)


def _score_batch(model: PairScorer, batch: Sequence[RowGroup]) -> dict[int, PairScore]:
    """Return the scores of a batch by the number of the pair."""
    shared, cache = min(group.shared for group in batch), None
    if shared:
        contexts = KeyValueCache()
        model.next_logits(torch.tensor([group.rows[0].tokens[:shared] for group in batch]), contexts)
        cache = contexts.repeated(torch.tensor([len(group.rows) for group in batch]))
    rows = [row for group in batch for row in group.rows]
    width = max(len(row.tokens) for row in rows) - shared
    # Padding stands on the right: attention is causal, so that nothing before it changes.
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    where = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for place, row in enumerate(rows):
        length = len(row.tokens) - shared
        tokens[place, :length] = torch.tensor(row.tokens[shared:])
        where[place, length - 1 - row.scored : length - 1] = True
    losses, likeliest = model.score(tokens, where, cache)
    counts = [row.scored for row in rows]
    scores = {}
    for row, loss, best in zip(rows, torch.split(losses.double(), counts), torch.split(likeliest, counts), strict=True):
        if not torch.isfinite(loss).all():
            raise TrainshortError(
                "a log-likelihood is not finite: the checkpoint's weights have diverged, take an earlier one"
            )
        scores[row.number] = PairScore(-float(loss.sum()), bool(best.all()))
    return scores
