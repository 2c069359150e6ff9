"""Keys whose value names an implementation: the words that a run file may say. Imports no torch.

Each table has one row per word. The file that implements a word lies with its package; to add one, write that file
and a row here, in `configs.positions`, `configs.backends` or `configs.precisions`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Choice:
    """One word.

    Attributes:
        name: What the run file says.
        what: In a few words, for the docs.
        available: Whether this version implements it; a known word that it does not implement is refused by name.
    """

    name: str
    what: str
    available: bool = True


FAMILIES = {
    row.name: row
    for row in (
        Choice("bloom", "Bloom: biases everywhere, a LayerNorm behind the embedding, tanh GELU"),
        Choice("mpt", "MPT: no biases, exact GELU", available=False),
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
    row.name: row
    for row in (
        OptimizerChoice(
            "adamw", "AdamW; matrices decay, norms and biases do not", moments=("exp_avg", "exp_avg_sq")
        ),
    )
}


@dataclass(frozen=True)
class OneOf:
    """The type of a key whose value is a row of a table; `also` adds words that are no row.

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
