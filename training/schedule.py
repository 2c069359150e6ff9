"""The learning rate as a pure function of the step: linear warm-up, then a cosine."""

import math

from configs.schema import Train


def learning_rate(step: int, *, train: Train) -> float:
    """Return the learning rate of a step, counted from 1; past the decay it stays at the minimum.

    Depends on no key that may change between two starts of a run: `decay_steps` must be set.
    """
    assert train.decay_steps is not None, "decay_steps is fixed at the first start of a run"
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = min((step - train.warmup_steps) / (train.decay_steps - train.warmup_steps), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_learning_rate + share * (train.learning_rate - train.min_learning_rate)
