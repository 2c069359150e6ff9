"""What BLOOM, MPT and Jais can hold, in transformers and llama.cpp. Imports no torch: it is said before training."""

from collections.abc import Sequence

from configs.positions import ALIBI_BIAS_MAX, POSITIONS
from configs.schema import Model
from training.families.bloom import BLOOM
from training.families.jais import JAIS
from training.families.mpt import MPT

_IN_TRANSFORMERS = (BLOOM.name, MPT.name)
LLAMA_CPP_FAMILIES = (BLOOM.name, MPT.name, JAIS.name)
_POSITIONS = ("alibi",)


def huggingface_problem(model: Model) -> str | None:
    """Return why transformers' class of its family cannot hold a model; None if it can.

    It names each key, its value and what the class holds.
    """
    other = "--format gguf or " if gguf_problem(model) is None else ""
    if model.family not in _IN_TRANSFORMERS:
        return _no_class("transformers", model, known=_IN_TRANSFORMERS, advice=_advice(model, other=other))
    # transformers' Mpt reads alibi_bias_max and computes with 8
    return _problem(model, any_slopes=False, advice=_advice(model, other=other))


def gguf_problem(model: Model) -> str | None:
    """Return why llama.cpp's architecture of its family cannot hold a model; see `huggingface_problem`."""
    if model.family not in LLAMA_CPP_FAMILIES:
        return _no_class("llama.cpp", model, known=LLAMA_CPP_FAMILIES, advice=_advice(model))
    return _problem(model, any_slopes=model.family != BLOOM.name, advice=_advice(model))


def carried_code_problem(model: Model) -> str | None:
    """Return why the code that an export can carry cannot hold a model; None if it can."""
    if POSITIONS[model.position].carried:
        return None
    holds = ", ".join(row.name for row in POSITIONS.values() if row.carried)
    return (
        f"the code of --with-code cannot hold model.position {model.position} (it holds {holds}): this model cannot be "
        "exported"
    )


def _advice(model: Model, *, other: str = "") -> str:
    """Return what to do with a model that a format cannot hold."""
    carried = POSITIONS[model.position].carried
    return f"export with {other}--format hf --with-code" if carried else "no other format can hold it"


def _no_class(engine: str, model: Model, *, known: Sequence[str], advice: str) -> str:
    return f"{engine} has no class for model.family {model.family} (it has {', '.join(known)}): {advice}"


def _problem(model: Model, *, any_slopes: bool, advice: str) -> str | None:
    problems = []
    if model.position not in _POSITIONS:
        problems.append(f"model.position {model.position} (it holds {' or '.join(_POSITIONS)})")
    if model.alibi_bias_max != ALIBI_BIAS_MAX and not any_slopes:
        problems.append(f"model.alibi_bias_max {model.alibi_bias_max} (it holds {ALIBI_BIAS_MAX})")
    if model.inner != 4 * model.hidden and model.family != JAIS.name:
        problems.append(f"model.feed_forward {model.inner} (it holds 4 x hidden, {4 * model.hidden})")
    if model.window is not None:
        problems.append(f"model.window {model.window} (it holds null, all tokens)")
    if not problems:
        return None
    return f"{model.family.upper()} cannot hold {'; '.join(problems)}: {advice}"
