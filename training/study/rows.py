"""Rows of finished runs: a file of JSON lines to commit, so that another machine need not repeat them. No torch.

A row says what made its figures: the keys that decide a result and their hash, hashes of the data, the code.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from configs.errors import InputError, MachineError
from configs.files import try_to_lock, whole_file
from configs.schema import RunConfig
from configs.schema_problems import first_problem
from data_pipeline.hashes import json_sha256
from training.checkpoint.title import named_run
from training.evaluation.kept import AtLeastOne, Kept
from training.folder import CHECKPOINT_KEYS, MAY_CHANGE, with_dotted_keys

# Keys that say where things are and what they are called. The data's hashes identify the data.
_PLACES = ("run.name", "data.dir", "data.sources", "data.tokenizer")
_STEPS = "train.steps"  # a later start may change it, but it decides the result
_BRANCH_FROM = "train.branch_from"


@dataclass(frozen=True)
class StudyRow:
    """One finished run of a study.

    Attributes:
        study: Name of the study.
        run: Its name in the study.
        seed: Its seed.
        config_sha256: Hash of `config`.
        config: The keys that decide its result, as dotted keys.
        data: Hashes of the data and its tokenizer, and its tokens; None where unknown.
        code: Version of trainshort, commit, and whether the code had changes; None where unknown.
        device: What it was trained on.
        finished_at: When the row was made, in UTC.
        figures: Parameters, tokens, seconds, speed, memory, losses; None where unknown.
        results: Each with text, text_sha256, protocol, length, tokens, loss, perplexity and, where the report has them,
            documents_sha256 and standard_error.
    """

    study: str
    run: str
    seed: int
    config_sha256: str
    config: dict[str, Any]
    data: dict[str, Any]
    code: dict[str, Any]
    device: str | None
    finished_at: str
    figures: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def key(self) -> tuple[str, str, int]:
        """What a study has one row of."""
        return self.study, self.run, self.seed


_ADAPTER: TypeAdapter[StudyRow] = TypeAdapter(StudyRow)


class _RowData(Kept):
    sha256: str | None = None
    tokenizer_sha256: str | None = None
    tokens: int | None = None


class _RowResult(Kept):
    text: str
    text_sha256: str | None
    documents_sha256: str | None = None
    protocol: str
    length: AtLeastOne
    tokens: int | None = None
    loss: float | None = None
    perplexity: Annotated[float, Field(gt=0)]
    standard_error: float | None = None


class _RowFigures(Kept):
    train_length: AtLeastOne
    parameters: int | None = None
    tokens: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_gb: float | None = None
    loss: float | None = None


class _RowForm(Kept):
    """What a line must hold where a row has values by name."""

    data: _RowData
    code: dict[str, str | bool | None]
    figures: _RowFigures
    results: list[_RowResult]


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a run that decide its result, as dotted keys.

    Layout, tracking and places are left out: a run may go on with others. So may the attention backend's windows and
    what is recomputed, which change no more than rounding.
    """
    values = with_dotted_keys(config.model_dump(mode="json"))
    kept = {key: value for key, value in values.items() if key == _STEPS or not key.startswith((*MAY_CHANGE, *_PLACES))}
    weights = [source.weight for source in config.data.sources]
    decay_steps = config.train.decay_steps if config.train.decay_steps != config.train.steps else None  # its default
    return {**kept, "train.decay_steps": decay_steps, "data.weights": weights}


def values_sha256(values: Mapping[str, Any]) -> str:
    """Return the hash of the result of `deciding_values`."""
    return json_sha256(values)


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how deciding values differ, as in `train.steps was 10, is 20`.

    A missing key has its default. A checkpoint may be spelled differently; relative paths begin at the current folder.
    """
    if values_sha256(before) == values_sha256(now):
        return []
    keys = dict.fromkeys((*before, *now))
    pairs = ((key, *(values.get(key, _default(key)) for values in (before, now))) for key in keys)
    return [
        f"{key} was {json.dumps(then)}, is {json.dumps(value)}"
        for key, then, value in pairs
        if not _is_same(key, then, value)
    ]


def _is_same(key: str, then: Any, now: Any) -> bool:
    if key not in CHECKPOINT_KEYS or not (isinstance(then, str) and isinstance(now, str)):
        return bool(then == now)
    before, place = Path(then).resolve(), Path(now).resolve()
    # of a run folder, a branch's first start took the checkpoint that was the newest then
    return before == place or (key == _BRANCH_FROM and named_run(before) == place)


def _default(key: str) -> Any:
    """Return the default of a key as a row has it; None for one that has none."""
    fields: Any = RunConfig.model_fields
    section, _, name = key.partition(".")
    field = getattr(fields[section].annotation, "model_fields", {}).get(name) if section in fields else None
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def read_study_rows(path: Path, *, study: str) -> dict[tuple[str, int], StudyRow]:
    """Return the rows of a study by run and seed; empty if there is no file.

    Raises:
        InputError: the file cannot be read, or a line is not a row.
    """
    rows = [row for _, row in _lines(path) if row.study == study]
    return {(row.run, row.seed): row for row in rows}


def write_row(path: Path, row: StudyRow) -> None:
    """Add a row to a file, in place of the run's earlier one. The file is replaced whole or not at all.

    Raises:
        InputError: the file cannot be read, or a line is not a row.
        MachineError: it cannot be written.
    """
    added = json.dumps(_ADAPTER.dump_python(row, mode="json"), allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with try_to_lock(path.parent):  # another study may have the same file
            lines = [*(line for line, other in _lines(path) if other.key != row.key), added]
            with whole_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"rows file {path} cannot be written ({error.strerror}): free space, fix its permissions, or set `rows` of "
            "the study"
        ) from None


def _lines(path: Path) -> Iterator[tuple[str, StudyRow]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"rows file {path} cannot be read ({error}): fix it, or set `rows` of the study") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            _RowForm.model_validate_json(line)
            yield line, _ADAPTER.validate_json(line)
        except ValidationError as error:
            raise InputError(
                f"rows file {path}, line {number} is not a row of a study ({first_problem(error, whole='the line')}): "
                "remove the line to train its run again, or bring it back"
            ) from None
