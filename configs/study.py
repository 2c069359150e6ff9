"""A study: runs that are given as differences from one run file. Read STUDY.yaml and make its runs.

All problems, of the study and of each of its runs, are reported in one message.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from configs.errors import InputError
from configs.load import find_yaml, load_run, problem_message, read_text_file
from configs.path_text import PathText
from configs.protocols import PROTOCOL_NAMES
from configs.schema import RunConfig
from configs.schema_problems import refused_keys, schema_problems
from configs.section import TUPLE, Section, SequenceLength
from configs.strict_yaml import WrittenFloat, WrittenInt, parse_yaml, with_subject

STUDIES = Path(__file__).parent / "studies"
HELD_OUT_TEXT = "held-out"
STUDY_TAG = "trainshort.study"
"""The tag in MLflow of a study's runs; its value is the study's name."""

_KEY = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_.-]+")
# Keys that a study sets in each run, and what to set instead.
_OWN_KEYS = {
    "run.name": "the run's name in the study is used",
    "run.dir": "`dir` of the study says where its runs are",
    "run.seed": "`seeds` has the seeds",
    "evaluate.lengths": "`lengths` of the study has them",
    "evaluate.protocols": "`protocols` of the study has them",
    "track.tags": "the study sets its own",
}
# What prepared data depends on: a run that differs in one of these has data of its own.
_DATA_KEYS = ("data.sources", "data.tokenizer", "data.vocab_size", "data.document_separator")

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], TUPLE]


def _empty_section(value: Any) -> Any:
    return {} if value is None else value


KeyValues = Annotated[dict[str, Any], BeforeValidator(_empty_section)]


class StudyRun(Section):
    """One run of a study: what differs from the others."""

    set: KeyValues = Field(default_factory=dict, description="Keys of the run file that differ, `section.key: value`.")
    seeds: Seeds | None = Field(
        default=None, min_length=1, description="Seeds of this run, a run each; those of the study unless set."
    )


class Study(Section):
    """A list of runs as differences from one run file, and how they are evaluated."""

    name: Name = Field(description="Name of the study, shown in MLflow.")
    base: str = Field(min_length=1, description="The run file that the runs differ from: a path or a shipped run.")
    runs: dict[Name, Annotated[StudyRun, BeforeValidator(_empty_section)]] = Field(
        min_length=1, description="The runs by name, in the order in which they are trained."
    )
    set: KeyValues = Field(
        default_factory=dict, description="Keys of the run file that differ from the base in all runs."
    )
    seeds: Seeds = Field(default=(1,), min_length=1, description="Seeds of each run; a seed is a run.")
    lengths: Annotated[tuple[SequenceLength, ...], TUPLE] | None = Field(
        default=None,
        min_length=1,
        description="Lengths that all runs are evaluated at, in tokens; those of the base unless set.",
    )
    protocols: Annotated[tuple[str, ...], TUPLE] = Field(
        default=("nonoverlapping",), min_length=1, description=f"{PROTOCOL_NAMES}."
    )
    texts: Annotated[tuple[PathText, ...], TUPLE] = Field(
        default=(HELD_OUT_TEXT,),
        min_length=1,
        description="Texts that the runs are evaluated on: held-out, or files as for `evaluate --data`.",
    )
    dir: PathText | None = Field(
        default=None, min_length=1, description="Folder of the runs, the data and the results; studies/NAME unless set."
    )
    rows: PathText | None = Field(
        default=None,
        min_length=1,
        description="File that gets a line for each finished run; STUDY.rows.jsonl beside STUDY.yaml unless set, for a "
        "shipped study in its folder.",
    )


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: one difference and one seed.

    Attributes:
        run: Its name in the study.
        seed: Its seed.
        differing: Keys in which it differs from the base, by name, without secrets.
        overrides: What makes its configuration of the base, as `section.key=value`.
        config: Its configuration.
    """

    run: str
    seed: int
    differing: dict[str, Any]
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def label(self) -> str:
        """Its name and seed; it does not change when seeds are added to the study."""
        return run_label(self.run, seed=self.seed)


@dataclass(frozen=True)
class LoadedStudy:
    """A study whose runs are all legal.

    Attributes:
        study: The study.
        shared: Keys in which all runs differ from the base, of `set` and the command line, without secrets.
        folder: Its folder.
        rows: File of the finished runs.
        runs: Its runs, in their order.
    """

    study: Study
    shared: dict[str, Any]
    folder: Path
    rows: Path
    runs: tuple[PlannedRun, ...]


def run_label(run: str, *, seed: int) -> str:
    """Return the name of a run folder: the run and its seed."""
    return f"{run}-seed{seed}"


def load_study(name_or_path: str, *, overrides: Sequence[str] = ()) -> LoadedStudy:
    """Read and check a study and each of its runs.

    Args:
        name_or_path: A YAML file, or the name of a file in configs/studies.
        overrides: For all runs, each `section.key=value`; they come after `set` of the study.
    Raises:
        InputError: the file, an override or a run is wrong; the message lists every problem.
    """
    path = find_yaml(name_or_path, shipped=STUDIES, what="study")
    parsed = parse_yaml(read_text_file(path, what="study"))
    if parsed.problems or not isinstance(parsed.value, dict):
        wrong = [with_subject(str(path), problem) for problem in parsed.problems]
        raise InputError(
            problem_message(name_or_path, wrong or [f"study {path} must hold keys such as base: demo"], ())
        )
    values, broken = parsed.value, list[str]()
    try:
        study: Study | None = Study.model_validate(values)
    except ValidationError as error:
        broken = schema_problems(error, is_whole=True, schema=Study)
        study = _valid_part(values, refused_keys(error))
    if study is None:
        raise InputError(problem_message(name_or_path, (), broken))
    broken += _study_problems(study, overrides)
    folder = Path(study.dir or f"studies/{study.name}")
    runs = list(_runs_of(study, folder, overrides, problems=broken))
    if broken:
        raise InputError(problem_message(name_or_path, (), broken))
    beside = folder / "rows.jsonl" if path.parent == STUDIES else path.with_name(f"{path.stem}.rows.jsonl")
    values = runs[0].config.model_dump(mode="json")
    shared = {key: _value_at(values, key) for key in dict.fromkeys((*study.set, *map(_key_of, overrides)))}
    return LoadedStudy(study, shared, folder, Path(study.rows) if study.rows else beside, tuple(runs))


def _valid_part(values: dict[str, Any], refused: set[tuple[Any, ...]]) -> Study | None:
    """Return the study with its valid keys and runs alone, so that they can be checked too; None without any."""
    valid = {key: value for key, value in values.items() if (key,) not in {location[:1] for location in refused}}
    runs = values.get("runs")
    if isinstance(runs, dict):
        valid["runs"] = {name: run for name, run in runs.items() if ("runs", name) not in refused}
    return Study.model_validate({"name": "study", **valid}) if "base" in valid and valid.get("runs") else None


def _study_problems(study: Study, overrides: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong between the keys of a study, and with its overrides."""
    typed = dict.fromkeys(map(_key_of, overrides))
    for owner, keys in (("set", study.set), *((f"runs.{name}.set", run.set) for name, run in study.runs.items())):
        for key in keys:
            if not _KEY.fullmatch(key):
                yield f"{owner} has {key!r}, not a key of a run file: write section.key, as in model.position"
            yield from _own_key_problem(owner, key)
            if owner != "set" and key in typed:
                yield f"--set {key} would replace what {owner} sets: change it there"
    for key in typed:
        yield from _own_key_problem("--set", key)
    for name, seeds in (
        ("seeds", study.seeds),
        *((f"runs.{name}.seeds", run.seeds) for name, run in study.runs.items()),
    ):
        if seeds is not None and len(set(seeds)) < len(seeds):
            yield f"{name} has a seed twice, got {list(seeds)}: name each once"
    names = [text_key(text) for text in study.texts]
    if len(set(names)) < len(names):
        yield f"texts has two texts of one name, got {', '.join(names)}: rename one"


def _key_of(override: str) -> str:
    return override.partition("=")[0]


def _own_key_problem(owner: str, key: str) -> Iterator[str]:
    for own, instead in _OWN_KEYS.items():
        if key == own or key.startswith(f"{own}."):
            yield f"{owner} has {key}, which a study sets itself: remove it, {instead}"


def text_key(text: str) -> str:
    """Return the name of a text in rows and tables: a file may lie elsewhere on another machine."""
    return text if text == HELD_OUT_TEXT else Path(text).name


def _runs_of(study: Study, folder: Path, overrides: Sequence[str], *, problems: list[str]) -> Iterator[PlannedRun]:
    """Yield the runs that are legal; append to `problems` what is wrong with the others, what several share once."""
    wrong: dict[str, list[str]] = {}
    for name, run in study.runs.items():
        for seed in run.seeds or study.seeds:
            try:
                yield _plan_run(study, folder, overrides, name=name, seed=seed)
            except InputError as error:
                first, *lines = str(error).split("\n  ")
                for line in lines or [first.removeprefix(f"{study.base}: ")]:
                    wrong.setdefault(line, []).append(name)
    for line, names in wrong.items():
        of_all = 1 < len(set(names)) == len(study.runs)
        problems.append(line if of_all else f"runs.{', runs.'.join(dict.fromkeys(names))}: {line}")


def _plan_run(study: Study, folder: Path, overrides: Sequence[str], *, name: str, seed: int) -> PlannedRun:
    """Return one run.

    Raises:
        InputError: its configuration is wrong; lists every problem.
    """
    own, label = study.runs[name].set, run_label(name, seed=seed)
    shared = [*_as_overrides(study.set), *overrides]
    fixed: dict[str, Any] = {
        "run.name": label,
        "run.dir": str(folder / label),
        "run.seed": seed,
        "evaluate.protocols": study.protocols,
        "track.tags": {STUDY_TAG: study.name},
    }
    if study.lengths is not None:
        fixed["evaluate.lengths"] = study.lengths
    words = (*shared, *_as_overrides(own), *_as_overrides(fixed))
    config = load_run(study.base, overrides=words)
    has_own_data = any(key in _DATA_KEYS for key in own)
    if "data.dir" not in own and (has_own_data or config.data.dir is None):
        data_dir = str(folder / (f"data-{name}" if has_own_data else "data"))
        words = (*words, *_as_overrides({"data.dir": data_dir}))
        config = load_run(study.base, overrides=words)
    values = config.model_dump(mode="json")  # which holds no secrets
    differing = {key: _value_at(values, key) for key in own}
    return PlannedRun(name, seed, differing, words, config)


def _as_overrides(keys: dict[str, Any]) -> tuple[str, ...]:
    # a name that is not a key has been reported
    return tuple(f"{key}={_as_written(value)}" for key, value in keys.items() if _KEY.fullmatch(key))


def _as_written(value: Any) -> str:
    """Return a value as YAML in one line, JSON but for numbers that are written in another way."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_written(key)}: {_as_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
