"""A model's parameters, and the shards, names and count derived from them. Imports no torch."""

from math import prod

from configs.choices import FAMILIES
from configs.positions import POSITIONS
from configs.schema import Model
from parallel.parameter import Shard
from training.families.description import Family, Parameter, Shards


def describe(model: Model, *, vocab_size: int) -> tuple[Parameter, ...]:
    """Return every parameter of a model, each once, in the order of the layers; a learned position table is last.

    Args:
        model: The decoder's shape.
        vocab_size: Rows of the embedding, without padding.
    """
    family: Family = FAMILIES[model.family].load()
    return (*family.parameters(family, model, vocab_size), *_position_table(model))


def shards_of(model: Model, *, vocab_size: int) -> Shards:
    """Return the shards of a model's parameters by logical name."""
    return {parameter.shard.name: parameter.shard for parameter in describe(model, vocab_size=vocab_size)}


def huggingface_names(model: Model) -> dict[str, str]:
    """Return the names of a model's parameters in transformers' model of its family, by logical name.

    A learned position table is left out: transformers' model has no place for it.
    """
    parameters = describe(model, vocab_size=1)  # names do not depend on the vocabulary
    return {parameter.shard.name: name for parameter in parameters if (name := parameter.huggingface) is not None}


def parameter_count(model: Model, *, vocab_size: int) -> int:
    """Return the number of a model's parameters; a tied one counts once.

    Args:
        model: The decoder's shape.
        vocab_size: Rows of the embedding, without padding.
    """
    return sum(prod(parameter.shard.shape) for parameter in describe(model, vocab_size=vocab_size))


def position_table_name(position: str) -> str:
    """Return the logical name of a position method's learned table."""
    return f"positions.{position}.weight"


def _position_table(model: Model) -> tuple[Parameter, ...]:
    row = POSITIONS[model.position]
    if not row.entries_per_head:
        return ()
    # All blocks use it, so every pipeline stage holds it. Its entries are biases, so they do not decay.
    name = position_table_name(model.position)
    std = model.init_std if row.table_std is None else row.table_std
    shard = Shard(name, (model.heads, row.entries_per_head), "column", std, tied=True)
    return (Parameter(shard, huggingface=None, gguf=None),)
