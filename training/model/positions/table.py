"""The position methods by name. `configs.positions` has a row for each."""

from configs.schema import Model
from parallel.axes import Group
from training.families.description import Shards
from training.families.table import position_table_name
from training.model.positions.alibi import Alibi
from training.model.positions.method import PositionMethod
from training.model.positions.rotary import Rotary
from training.model.positions.sinusoidal import Sinusoidal
from training.model.positions.t5 import T5

METHODS: dict[str, type[PositionMethod]] = {
    "alibi": Alibi,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "t5": T5,
    "none": PositionMethod,
}


def make_position(model: Model, shards: Shards, *, tensor: Group) -> PositionMethod:
    """Return a model's position method on one tensor rank.

    Args:
        model: The decoder's shape.
        shards: The model's shards; a learned table is among them.
        tensor: The tensor axis.
    """
    table = shards.get(position_table_name(model.position))
    return METHODS[model.position](model, tensor=tensor, table=table)
