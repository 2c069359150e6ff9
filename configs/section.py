"""What the sections of a run file and of a study are made of: the types of keys, and the class of a section."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from configs.secrets import hide_secrets, public_variables, without_password
from configs.strict_yaml import WrittenFloat, WrittenInt


def _tuple_of_list(value: Any) -> Any:
    # YAML gives lists; a frozen section holds tuples, and strict pydantic does not convert.
    return tuple(value) if isinstance(value, list) else value


def text_of_number(value: Any) -> Any:
    """Return a number that YAML has read as the text that stands there; anything else as it is."""
    # YAML reads an unquoted 90 as a number: accept it as text; configs.rules says what to write. And 1 equals true.
    if isinstance(value, WrittenInt | WrittenFloat):  # a tag or a variable of 1.10 is not 1.1
        return value.text
    return str(value) if type(value) in (int, float) else value


def _countable(value: int) -> int:
    if value > LARGEST_NUMBER:
        raise PydanticCustomError("too_large", "Input should be at most 2^53")
    return value


def _list_of_lists(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(each, list | tuple) for each in value):
        raise PydanticCustomError("pairs", "Input should be a list of pairs, as [[256, 1000]]")
    return value


def _public_lines(lines: tuple[str, ...]) -> list[str]:
    return [hide_secrets(line) for line in lines]


LARGEST_NUMBER = 2**53
"""Largest whole number of a run file, but for the seed: JSON, MLflow and floats hold all whole numbers up to it."""

COUNTABLE = AfterValidator(_countable)
TUPLE = BeforeValidator(_tuple_of_list)
# What is written and sent is the JSON form of a run: keys that may hold a secret leave it out there.
PUBLIC_URI = PlainSerializer(without_password, return_type=str, when_used="json")
PUBLIC_VARIABLES = PlainSerializer(public_variables, return_type=dict[str, str], when_used="json")
PUBLIC_LINES = PlainSerializer(_public_lines, return_type=list[str], when_used="json")
TextOrNumber = Annotated[str, BeforeValidator(text_of_number)]

PositiveInt = Annotated[int, Field(ge=1), COUNTABLE]
SequenceLength = Annotated[int, Field(ge=2), COUNTABLE]
NonNegativeInt = Annotated[int, Field(ge=0), COUNTABLE]
# pairs of a value and for how many steps it holds, in their order
StepStages = Annotated[
    tuple[Annotated[tuple[PositiveInt, PositiveInt], TUPLE], ...], TUPLE, BeforeValidator(_list_of_lists)
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys, wrong types, nan and inf are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
