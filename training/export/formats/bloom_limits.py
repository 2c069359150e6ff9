"""What BLOOM can hold, in transformers and llama.cpp. Imports neither, and no torch: it is said before training."""

from configs.schema import Model
from training.families.bloom import BLOOM

_FAMILIES = (BLOOM.name,)
_POSITIONS = ("alibi",)


def bloom_problem(model: Model) -> str | None:
    """Return why BLOOM cannot hold a model, with each key, its value and what BLOOM holds; None if it can."""
    problems = []
    if model.family not in _FAMILIES:
        problems.append(f"model.family {model.family} (it holds {' or '.join(_FAMILIES)})")
    if model.position not in _POSITIONS:
        problems.append(f"model.position {model.position} (it holds {' or '.join(_POSITIONS)})")
    if model.inner != 4 * model.hidden:
        problems.append(f"model.feed_forward {model.inner} (it holds 4 x hidden, {4 * model.hidden})")
    if model.window is not None:
        problems.append(f"model.window {model.window} (it holds null, all tokens)")
    if not problems:
        return None
    return f"BLOOM cannot hold {'; '.join(problems)}: this model cannot be exported"
