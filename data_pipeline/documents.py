"""Where documents begin in a stretch of tokens. Numpy only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def document_begins(tokens: NDArray[np.integer[Any]], *, joins: NDArray[np.int64], end: int) -> NDArray[np.bool_]:
    """Return whether each token begins a document, [tokens].

    The token that ends a document counts as the first of the next. As a target it is still the last of its own; as an
    input it predicts the next document's first token, as after an empty prompt.

    Args:
        tokens: The tokens, [tokens].
        joins: Places at which unrelated text begins, in [0, tokens).
        end: The token that ends a document.
    """
    begins: NDArray[np.bool_] = tokens == end
    begins[:1] = True
    joins = joins[joins > 0]
    begins[joins[tokens[joins - 1] != end]] = True
    return begins
