"""What makes a model another one, even if the weights of one fit into the other. Imports no torch."""

from configs.schema import Model
from configs.strict_yaml import as_yaml

# `inner` is `feed_forward` with its default
_KEYS = (
    *("family", "position", "heads", "window", "alibi_bias_max"),
    *("layers", "hidden", "inner", "tie_embeddings"),
)


def model_difference(first: Model, second: Model) -> tuple[str, str, str] | None:
    """Return the first key that makes two models different, and both values as a run file has them; None if none does.

    All other keys change how a model is computed or began, and not what its weights mean.
    """
    for key in _KEYS:
        values = getattr(first, key), getattr(second, key)
        if values[0] != values[1]:
            return f"model.{'feed_forward' if key == 'inner' else key}", as_yaml(values[0]), as_yaml(values[1])
    return None
