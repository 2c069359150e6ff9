"""Where documents begin in a stretch of tokens. Numpy only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def document_begins(tokens: NDArray[np.integer[Any]], *, joins: NDArray[np.int64], end: int) -> NDArray[np.bool_]:
    """Return whether each token begins a document, [tokens].

    A token that ends a document begins the next one: as a target it is the last of its own, as an input the next one's
    first token is predicted from it alone, as it is from an empty prompt.

    Args:
        tokens: The tokens, [tokens].
        joins: Places at which text begins that does not follow from what is before it, in [0, tokens).
        end: The token that ends a document.
    """
    begins: NDArray[np.bool_] = tokens == end
    begins[:1] = True
    joins = joins[joins > 0]
    begins[joins[tokens[joins - 1] != end]] = True
    return begins
