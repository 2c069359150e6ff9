"""Legal values of keys that name an implementation. Imports no torch.

Each table has a row per value, which also says where the implementation is. To add one, write its file and a row: here,
in `configs.positions`, `configs.backends` or `configs.precisions`. Export formats, which no key names, have a table of
their own, `training.export.formats.table`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Choice:
    """One value of a key.

    Attributes:
        name: What the run file says.
        implementation: Dotted path of what implements it, imported when it is used; None for a word that this version
            knows but does not implement, and refuses by name.
    """

    name: str
    implementation: str | None

    @property
    def available(self) -> bool:
        """Whether this version implements it."""
        return self.implementation is not None

    def load(self) -> Any:
        """Import and return the implementation."""
        assert self.implementation is not None, f"{self.name} is not available in this version"
        module, _, name = self.implementation.rpartition(".")
        return getattr(import_module(module), name)


@dataclass(frozen=True)
class FamilyChoice(Choice):
    """A block design; `implementation` is its description.

    Attributes:
        layers: Dotted path of the function that plans its layers; it imports torch, the description does not.
    """

    layers: str | None = None

    def load_layers(self) -> Any:
        """Import and return the function that plans the layers."""
        return Choice(self.name, self.layers).load()


FAMILIES = {
    row.name: row
    for row in (
        FamilyChoice("bloom", "training.families.bloom.BLOOM", layers="training.model.blocks.bloom.plan_bloom"),
        FamilyChoice("mpt", None),
    )
}


@dataclass(frozen=True)
class OptimizerChoice(Choice):
    """An optimizer.

    Attributes:
        moments: The tensors that it keeps per parameter beside the weight, by the names of its state.
    """

    moments: tuple[str, ...] = ()

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What training keeps per parameter, in the order of a checkpoint's files: the weight, then the moments."""
        return ("weight", *self.moments)


OPTIMIZERS = {
    row.name: row for row in (OptimizerChoice("adamw", "parallel.optimizers.adamw", moments=("exp_avg", "exp_avg_sq")),)
}


@dataclass(frozen=True)
class OneOf:
    """The type of a key whose value is a row of a table; `also` adds values without a row, such as auto.

    It reads the table at each check, so that a row added later is a legal word.
    """

    table: Mapping[str, Any]
    also: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The legal words, in the order of the docs."""
        return (*self.also, *self.table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema that accepts the words alone, with the message of a Literal."""
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        quoted = [repr(word) for word in self.words]
        expected = " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
