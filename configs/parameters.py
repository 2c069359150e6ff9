"""How many parameters a model of a given shape has, counted without building it."""

from configs.schema import Model


def parameter_count(model: Model, *, vocab_size: int) -> int:
    """Return the trained numbers of the bloom family: tied head, biases, embedding LayerNorm.

    Of the position methods only T5's has parameters, 32 a head: ALiBi's slopes and sinusoids are derived.

    Args:
        model: The decoder's shape.
        vocab_size: Rows of the embedding.
    """
    hidden, inner = model.hidden, model.inner
    norm = 2 * hidden
    attention = (hidden + 1) * 3 * hidden + (hidden + 1) * hidden
    feed_forward = (hidden + 1) * inner + (inner + 1) * hidden
    block = norm + attention + norm + feed_forward
    positions = 32 * model.heads if model.position == "t5" else 0
    return vocab_size * hidden + norm + model.layers * block + norm + positions
