"""What BLOOM and MPT can hold, in transformers and llama.cpp. Imports no torch: it is said before training."""

from configs.positions import ALIBI_BIAS_MAX, POSITIONS
from configs.schema import Model
from training.families.bloom import BLOOM
from training.families.mpt import MPT

_FAMILIES = (BLOOM.name, MPT.name)
_POSITIONS = ("alibi",)


def huggingface_problem(model: Model) -> str | None:
    """Return why transformers' class of its family cannot hold a model; None if it can.

    It names each key, its value and what the class holds.
    """
    # transformers' Mpt reads alibi_bias_max and computes with 8
    return _problem(model, any_slopes=False, other="--format gguf or " if gguf_problem(model) is None else "")


def gguf_problem(model: Model) -> str | None:
    """Return why llama.cpp's architecture of its family cannot hold a model; see `huggingface_problem`."""
    return _problem(model, any_slopes=model.family == MPT.name)


def carried_code_problem(model: Model) -> str | None:
    """Return why the code that an export can carry cannot hold a model; None if it can."""
    if POSITIONS[model.position].carried:
        return None
    holds = ", ".join(row.name for row in POSITIONS.values() if row.carried)
    return (
        f"the code of --with-code cannot hold model.position {model.position} (it holds {holds}): this model cannot be "
        "exported"
    )


def _problem(model: Model, *, any_slopes: bool, other: str = "") -> str | None:
    problems = []
    if model.family not in _FAMILIES:
        problems.append(f"model.family {model.family} (it holds {' or '.join(_FAMILIES)})")
    if model.position not in _POSITIONS:
        problems.append(f"model.position {model.position} (it holds {' or '.join(_POSITIONS)})")
    if model.alibi_bias_max != ALIBI_BIAS_MAX and not any_slopes:
        problems.append(f"model.alibi_bias_max {model.alibi_bias_max} (it holds {ALIBI_BIAS_MAX})")
    if model.inner != 4 * model.hidden:
        problems.append(f"model.feed_forward {model.inner} (it holds 4 x hidden, {4 * model.hidden})")
    if model.window is not None:
        problems.append(f"model.window {model.window} (it holds null, all tokens)")
    if not problems:
        return None
    carried = POSITIONS[model.position].carried
    advice = f"export with {other}--format hf --with-code" if carried else "nor can any other format"
    return f"{model.family.upper()} cannot hold {'; '.join(problems)}: {advice}"
