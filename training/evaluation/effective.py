"""The effective context: how much of its context a model was measured to make use of. Imports no torch."""

import math
from collections.abc import Sequence

# how much worse than the best a perplexity may be, as for the usable length
_RATIO = 1.01


def effective_context(contexts: Sequence[int], losses: Sequence[float]) -> int:
    """Return the shortest context whose perplexity is within 1 % of the best one's.

    The best, and not the longest, since longer contexts than in training may do harm.

    Args:
        contexts: Tokens of context, ascending.
        losses: The loss of the same tokens with each, in nats.
    """
    limit = min(losses) + math.log(_RATIO)
    return next(context for context, loss in zip(contexts, losses, strict=True) if loss <= limit)
