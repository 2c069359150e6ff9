"""Legal values of keys that name an implementation. Imports no torch.

Each table has one row per value, which also names the implementation. To add a value, write its file and a row: here,
in `configs.positions`, `configs.backends` or `configs.precisions`. Export formats are not values of a key; their
table is `training.export.formats.table`.
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
        name: The value in the run file.
        implementation: Dotted path of the implementation, imported on first use; None for a value without one.
    """

    name: str
    implementation: str | None

    def load(self) -> Any:
        """Import and return the implementation."""
        assert self.implementation is not None, f"{self.name} has no implementation"
        module, _, name = self.implementation.rpartition(".")
        return getattr(import_module(module), name)


@dataclass(frozen=True)
class FamilyChoice(Choice):
    """A block design; `implementation` is its description.

    Attributes:
        layers: Dotted path of the function that plans its layers; it imports torch, the description does not.
        feed_forward_matrices: Matrices of a feed-forward: two, or three with a gate.
    """

    layers: str | None = None
    feed_forward_matrices: int = 2

    def default_inner(self, hidden: int) -> int:
        """Return the width of the feed-forward unless it is set: 8 hidden^2 weights, with a gate as without one.

        With a gate that is 8/3 x hidden, rounded up to a multiple of 64, which tensor ranks can divide.
        """
        if self.feed_forward_matrices == 2:
            return 4 * hidden
        return -(-8 * hidden // (3 * 64)) * 64

    def load_layers(self) -> Any:
        """Import and return the function that plans the layers."""
        return Choice(self.name, self.layers).load()


FAMILIES = {
    row.name: row
    for row in (
        FamilyChoice("bloom", "training.families.bloom.BLOOM", layers="training.model.blocks.prenorm.plan_prenorm"),
        FamilyChoice("mpt", "training.families.mpt.MPT", layers="training.model.blocks.prenorm.plan_prenorm"),
        FamilyChoice(
            "jais",
            "training.families.jais.JAIS",
            layers="training.model.blocks.prenorm.plan_prenorm",
            feed_forward_matrices=3,
        ),
    )
}


@dataclass(frozen=True)
class OptimizerChoice(Choice):
    """An optimizer.

    Attributes:
        moments: Tensors that it keeps per parameter in addition to the weight, named as in its state.
        moments_of_matrices: Those of `moments` that it keeps of a block's weight matrix; all unless set.
    """

    moments: tuple[str, ...] = ()
    moments_of_matrices: tuple[str, ...] | None = None

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """The tensors kept per parameter, in the order of a checkpoint's files: the weight, then the moments."""
        return ("weight", *self.moments)

    def moments_of(self, *, is_matrix: bool) -> tuple[str, ...]:
        """Return the moments of a block's weight matrix, or of another parameter."""
        return self.moments if self.moments_of_matrices is None or not is_matrix else self.moments_of_matrices

    def kinds_of(self, *, is_matrix: bool) -> tuple[str, ...]:
        """Return those of `state_kinds` that are kept of a block's weight matrix, or of another parameter."""
        return ("weight", *self.moments_of(is_matrix=is_matrix))


_ADAM = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {
    row.name: row
    for row in (
        OptimizerChoice("adamw", "parallel.optimizers.adamw", moments=_ADAM),
        OptimizerChoice("muon", "parallel.optimizers.muon", moments=_ADAM, moments_of_matrices=("exp_avg",)),
    )
}


@dataclass(frozen=True)
class OneOf:
    """The type of a key whose value names a row of a table; `also` adds values without a row, such as auto.

    Reads the table at each check, so a row added later is accepted.
    """

    table: Mapping[str, Any]
    also: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Legal words, in the order of the docs."""
        return (*self.also, *self.table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema that accepts only these words, with the error message of a Literal."""
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        quoted = [repr(word) for word in self.words]
        expected = " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
