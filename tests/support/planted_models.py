"""Models whose use of context is known, and texts on which it shows."""

import math

import numpy as np
import torch

VOCABULARY = 64
_SURE = 0.9  # what a model gives to the token that it expects; the others share the rest


class PlantedModel:
    """A model that looks back a fixed distance, if that is in its window, and else knows nothing.

    Each token of its text is decided by the token `distance` before it: `expected` of it. So with less context, a
    prediction has the loss of a uniform model.
    """

    batch_tokens = 4096
    windows = None

    def __init__(self, distance: int, *, harmed_beyond: int | None = None) -> None:
        """Make a model.

        Args:
            distance: How far it looks back; 1 is a bigram model, which depends on the last token alone.
            harmed_beyond: Tokens of context beyond which it gives up; None if there is no such length.
        """
        self.distance, self.harmed_beyond = distance, harmed_beyond

    def text(self, tokens: int) -> np.ndarray:
        """Return a text in which it is right with probability `_SURE`, [tokens]."""
        rng = np.random.default_rng(self.distance)
        text = rng.integers(VOCABULARY, size=tokens, dtype=np.int64)
        right = rng.random(tokens) < _SURE
        for place in range(self.distance, tokens):
            if right[place]:
                text[place] = (text[place - self.distance] + 1) % VOCABULARY
        return text

    def losses(self, tokens: torch.Tensor, *, last: int | None = None) -> torch.Tensor:
        """Return the loss of the last predicted tokens, [batch, last] fp32."""
        length = tokens.shape[1] - 1
        losses = torch.full((len(tokens), length), math.log(VOCABULARY))
        if length >= self.distance:
            seen, targets = tokens[:, : length + 1 - self.distance], tokens[:, self.distance :]
            hit = (seen + 1) % VOCABULARY == targets
            rest = math.log((1 - _SURE) / (VOCABULARY - 1))
            losses[:, self.distance - 1 :] = torch.where(hit, -math.log(_SURE), -rest)
        if self.harmed_beyond is not None:
            losses[:, self.harmed_beyond :] += 1.0
        return losses if last is None else losses[:, -last:]
