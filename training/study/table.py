"""The results of a study: a table of its runs, and their perplexities with mean and range over the seeds. No torch."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import MachineError
from configs.figures import byte_size, duration, perplexity_text, scaled
from configs.files import write_whole
from configs.paths import run_folder, study_file
from configs.study import LoadedStudy, PlannedRun
from training.checkpoint.title import checkpoint_title
from training.evaluation.results import DIFFERENT_TOKENS
from training.folder import CHECKPOINT_KEYS
from training.study.rows import StudyRow

FIGURE_NAME = "study.png"
NOT_MEASURED = "-"
RUN_COLUMNS = ("run", "seed", "differs in", "parameters", "tokens", "time", "tokens/s", "peak memory", "loss")


@dataclass(frozen=True)
class SeedRange:
    """A perplexity over the seeds of a run: the mean, the lowest, the highest."""

    mean: float
    lowest: float
    highest: float

    @property
    def spread(self) -> float:
        """How far the seeds are apart."""
        return self.highest - self.lowest


@dataclass(frozen=True)
class TextTable:
    """Perplexities of the runs on one text, by one protocol.

    Attributes:
        text: Name of the text.
        protocol: As on the command line.
        results: Each run's results by length, in the order of the study's finished runs.
    """

    text: str
    protocol: str
    results: tuple[tuple[StudyRow, dict[int, dict[str, Any]]], ...]

    @property
    def lengths(self) -> list[int]:
        """All lengths that were measured."""
        return sorted({length for _, results in self.results for length in results})

    @property
    def of_different_tokens(self) -> list[int]:
        """Lengths at which runs scored different numbers of tokens; with one tokenizer, different tokens."""
        every = [result for _, results in self.results for result in results.values()]
        counts = {(result["length"], result["tokens"]) for result in every if "tokens" in result}
        return [length for length in self.lengths if sum(length == each for each, _ in counts) > 1]

    def seeds_of(self, run: str) -> dict[int, SeedRange]:
        """Return mean and range over the seeds of a run, by length; at lengths at which all of them were measured."""
        ours = [results for row, results in self.results if row.run == run]
        shared = set.intersection(*(set(results) for results in ours)) if ours else set()
        values = {length: [results[length]["perplexity"] for results in ours] for length in sorted(shared)}
        return {length: SeedRange(statistics.mean(each), min(each), max(each)) for length, each in values.items()}


@dataclass(frozen=True)
class StudyTable:
    """What a study has measured so far.

    Attributes:
        loaded: The study.
        rows: Rows of its finished runs, in the order of the study.
        texts: Perplexities, a table per text and protocol.
    """

    loaded: LoadedStudy
    rows: tuple[StudyRow, ...]
    texts: tuple[TextTable, ...]

    @property
    def unfinished(self) -> list[str]:
        """Labels of the runs without a row."""
        done = {(row.run, row.seed) for row in self.rows}
        return [planned.label for planned in self.loaded.runs if (planned.run, planned.seed) not in done]

    @property
    def drawn(self) -> list[TextTable]:
        """Those of `texts` that give a line: one that only some seeds of each run were measured on has no mean."""
        return [text for text in self.texts if any(text.seeds_of(name) for name in self.names)]

    @property
    def names(self) -> list[str]:
        """The runs that have a row, each once."""
        return list(dict.fromkeys(row.run for row in self.rows))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        study, differing = self.loaded.study, {planned.run: planned.differing for planned in self.loaded.runs}
        return {
            "study": study.name,
            "base": study.base,
            "set": self.loaded.shared,
            "runs": [
                {
                    "run": row.run,
                    "seed": row.seed,
                    "differing": differing[row.run],
                    **row.figures,
                    "device": row.device,
                    "data": row.data,
                    "code": row.code,
                    "config_sha256": row.config_sha256,
                    "results": row.results,
                }
                for row in self.rows
            ],
            "over_seeds": [
                {"text": text.text, "protocol": text.protocol, "run": name, "length": length, **vars(values)}
                for text in self.texts
                for name in self.names
                for length, values in text.seeds_of(name).items()
            ],
            "unfinished": self.unfinished,
            "notes": list(self.notes()),
        }

    def run_rows(self) -> list[list[str]]:
        """Return the cells of `RUN_COLUMNS` for each row."""
        differing = {planned.run: named_differences(planned, self.loaded) for planned in self.loaded.runs}
        return [
            [
                row.run,
                str(row.seed),
                ", ".join(f"{key}: {json.dumps(value)}" for key, value in differing[row.run].items()) or NOT_MEASURED,
                *(_cell(row.figures.get(key), text) for key, text in _FORMATS.items()),
            ]
            for row in self.rows
        ]

    def notes(self) -> Iterator[str]:
        """Yield what keeps figures from being compared, and what is missing."""
        if self.unfinished:
            yield f"not finished: {', '.join(self.unfinished)}"
        tokenizers = {row.data.get("tokenizer_sha256") for row in self.rows}
        for text in self.texts:
            every = [result for _, results in text.results for result in results.values()]
            if len({result["text_sha256"] for result in every}) > 1:
                yield f"the texts called {text.text} differ: perplexities on them do not compare"
            elif len({result["documents_sha256"] for result in every if "documents_sha256" in result}) > 1:
                yield f"documents of {text.text} are masked in some runs: perplexities there do not compare with others"
            elif len(tokenizers) == 1 and (lengths := [f"{length:,}" for length in text.of_different_tokens]):
                yield f"{text.protocol} at {', '.join(lengths)} on {text.text}: {DIFFERENT_TOKENS}"
        if len(tokenizers) > 1:
            yield "the tokenizers differ: perplexities and losses are per token and do not compare"
        for name, values in (("devices", [row.device for row in self.rows]), ("code", [row.code for row in self.rows])):
            if len({json.dumps(value) for value in values}) > 1:
                yield f"the runs are of different {name}: see the rows"


_FORMATS = {
    "parameters": scaled,
    "tokens": scaled,
    "seconds": duration,
    "tokens_per_second": scaled,
    "memory_gb": lambda gigabytes: byte_size(gigabytes * 1e9),
    "loss": "{:.4f}".format,
}


def named_differences(planned: PlannedRun, loaded: LoadedStudy) -> dict[str, Any]:
    """Return the keys in which a run differs from the base, with a checkpoint of the study called by its run."""
    runs = {run_folder(each.config).resolve(): each.label for each in loaded.runs}
    titles = {
        key: checkpoint_title(Path(planned.differing[key]).resolve(), runs=runs)
        for key in CHECKPOINT_KEYS
        if planned.differing.get(key)
    }
    return {key: titles.get(key) or value for key, value in planned.differing.items()}


def build_table(loaded: LoadedStudy, rows: Mapping[tuple[str, int], StudyRow]) -> StudyTable:
    """Return the table of a study.

    Args:
        loaded: The study.
        rows: Its rows by run and seed; those of runs that it no longer has are left out.
    """
    ours = [row for planned in loaded.runs if (row := rows.get((planned.run, planned.seed))) is not None]
    measured = dict.fromkeys((result["text"], result["protocol"]) for row in ours for result in row.results)
    texts = [
        TextTable(text, protocol, tuple((row, _by_length(row, text, protocol)) for row in ours))
        for text, protocol in measured
    ]
    return StudyTable(loaded, tuple(ours), tuple(texts))


def perplexity_cells(table: StudyTable, text: TextTable) -> list[list[str]]:
    """Return the cells of a table of perplexities: run, seed, a perplexity per length; mean and spread below seeds.

    A perplexity has its standard error behind it, where the evaluation measured that of the loss: `72.07 ± 0.41`.
    """
    lines = []
    for name in table.names:
        ours = [(row, results) for row, results in text.results if row.run == name]
        for row, results in ours:
            lines.append([name, str(row.seed), *(_measured(results.get(length)) for length in text.lengths)])
        if len(ours) > 1:
            means = text.seeds_of(name)
            ranges = [means.get(length) for length in text.lengths]
            lines.append(
                [name, f"mean of {len(ours)}", *(_cell(each and each.mean, perplexity_text) for each in ranges)]
            )
            lines.append([name, "spread", *(_cell(each and each.spread, perplexity_text) for each in ranges)])
    return lines


def format_study(table: StudyTable) -> str:
    """Return the table as Markdown, with its figure."""
    study = table.loaded.study
    lines = [f"# {study.name}", "", *([f"![Perplexity against length]({FIGURE_NAME})", ""] if table.drawn else [])]
    same = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in table.loaded.shared.items())
    lines += [f"- from the run file `{study.base}`" + (f", in all runs {same}" if same else "")]
    lines += [f"- {note}" for note in table.notes()]
    lines += ["", "## Runs", "", *_markdown(RUN_COLUMNS, table.run_rows(), left=("run", "differs in"))]
    for text in table.texts:
        heading = ("run", "seed", *(f"{length:,}" for length in text.lengths))
        lines += ["", f"## Perplexity per token on {text.text}, {text.protocol}", ""]
        lines += _markdown(heading, perplexity_cells(table, text), left=("run",))
    lines += [
        "",
        "`spread`: from the lowest to the highest seed. `±`: standard error over the text's documents or blocks.",
    ]
    return "\n".join(lines) + "\n"


def write_table(table: StudyTable) -> tuple[Path, Path]:
    """Write the table to the study's folder, as JSON and as Markdown; return the paths.

    Raises:
        MachineError: it cannot be written.
    """
    folder = table.loaded.folder
    as_json = study_file(folder)
    markdown = as_json.with_suffix(".md")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(as_json, json.dumps(table.to_json(), indent=1, allow_nan=False) + "\n")
        write_whole(markdown, format_study(table))
    except OSError as error:
        raise unwritable_study(folder, error) from None
    return as_json, markdown


def unwritable_study(folder: Path, error: OSError) -> MachineError:
    """Return the error of a study's folder that cannot be written."""
    return MachineError(
        f"study folder {folder} cannot be written ({error.strerror}): free space, fix its permissions, or set `dir` of "
        "the study"
    )


def _by_length(row: StudyRow, text: str, protocol: str) -> dict[int, dict[str, Any]]:
    results = [each for each in row.results if (each["text"], each["protocol"]) == (text, protocol)]
    return {result["length"]: result for result in results}


def _cell(value: Any, text: Any) -> str:
    return NOT_MEASURED if value is None else str(text(value))


def _measured(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return NOT_MEASURED
    perplexity, error = result["perplexity"], result.get("standard_error")
    # the error is of the loss: to first order, that of its exponential is perplexity times it
    return perplexity_text(perplexity) + ("" if error is None else f" ± {perplexity_text(perplexity * error)}")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "|".join("---" if column in left else "---:" for column in columns) + "|"
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
