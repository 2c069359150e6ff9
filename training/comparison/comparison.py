"""Compare runs: figures, perplexities on the same text, and the keys that differ. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.commands import typed_path
from configs.paths import evaluation_folder
from configs.precisions import DEFAULT_PRECISION
from training.checkpoint.manifest import list_checkpoints
from training.checkpoint.title import checkpoint_title, named_run
from training.comparison.run import PLACE_KEYS, ComparedRun, name_of_run, read_runs
from training.evaluation.kept import (
    checkpoint_reports,
    is_held_out,
    is_same_text,
    label_among_equals,
    other_precision,
    read_report,
    text_name,
)
from training.evaluation.results import DIFFERENT_TOKENS, protocol_name, result_key
from training.folder import CHECKPOINT_KEYS

_SAME_PRECISION = f"Evaluate each in the same --precision; {DEFAULT_PRECISION} is the default"
# They differ between any two runs; the labels show them.
_OWN_KEYS = ("run.name", "run.dir")


@dataclass(frozen=True)
class TextResults:
    """Perplexities of the runs that were evaluated on one text.

    Attributes:
        text: Its name; its label where a run has several texts of that name.
        unit: perplexity, per token; or word_perplexity where their tokenizers differ.
        runs: The runs' numbers, in the order of the comparison.
        results: Each run's results by protocol, stride and length; in the order of `runs`.
    """

    text: str
    unit: str
    runs: tuple[int, ...]
    results: tuple[dict[tuple[str, int, int], dict[str, Any]], ...]

    @property
    def keys(self) -> list[tuple[str, int, int]]:
        """What was measured of any of the runs: protocol, stride and length; windows that do not overlap come first."""
        measured = {key for results in self.results for key in results}
        return sorted(measured, key=lambda key: (not key[0].startswith("nonoverlapping"), key))

    def value(self, run: int, key: tuple[str, int, int]) -> float | None:
        """Return a perplexity of a run; None if it was not measured."""
        results = dict(zip(self.runs, self.results, strict=True)).get(run, {})
        value: float | None = results.get(key, {}).get(self.unit)
        return value

    def protocol(self, key: tuple[str, int, int]) -> str:
        """Return the protocol of a result as on the command line."""
        return next(protocol_name(results[key]) for results in self.results if key in results)


@dataclass(frozen=True)
class Comparison:
    """What is known of several runs.

    Attributes:
        runs: The runs.
        texts: Perplexities, a table per text; the one with the most runs first.
        differences: Values of each key of the run files that differs, in the order of the runs; None also where a run
            file says nothing of its run.
        notes: What keeps the runs from being compared, and what to do about it.
        unevaluated: The notes about runs without an evaluation.
    """

    runs: tuple[ComparedRun, ...]
    texts: tuple[TextResults, ...]
    differences: dict[str, list[Any]]
    notes: tuple[str, ...]
    unevaluated: tuple[str, ...]

    def named_differences(self) -> dict[str, list[Any]]:
        """Return `differences` with checkpoints called by their runs, where these are known."""
        return {
            key: self._titles(key, values) if key in CHECKPOINT_KEYS else values
            for key, values in self.differences.items()
        }

    def _titles(self, key: str, values: list[Any]) -> list[Any]:
        places = [run.place(key, value) for run, value in zip(self.runs, values, strict=True)]
        runs = {run.run_dir.resolve(): run.label for run in self.runs}
        for folder in (named_run(place) for place in places if place is not None):
            name = name_of_run(folder)
            if name is not None and name not in runs.values():  # else it would be taken for another run
                runs.setdefault(folder, name)
        titles = [None if place is None else checkpoint_title(place, runs=runs) for place in places]
        return [title or value for title, value in zip(titles, values, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "runs": [_run_to_json(run) for run in self.runs],
            "perplexity": [self._text_to_json(text) for text in self.texts],
            "differences": self.differences,
            "notes": list(self.notes),
        }

    def _text_to_json(self, text: TextResults) -> dict[str, Any]:
        results = [
            {
                "length": key[2],
                "protocol": text.protocol(key),
                "values": [text.value(number, key) for number in range(len(self.runs))],
            }
            for key in text.keys
        ]
        return {"text": text.text, "unit": text.unit, "results": results}


def compare_runs(paths: Sequence[Path], *, text: str | None) -> Comparison:
    """Compare runs, in the order given; one that is given twice counts once.

    Args:
        paths: Run folders, or checkpoints in them.
        text: Label or file of the text whose perplexities to compare; None for the held-out text, or what there is.
    Raises:
        InputError: one holds no run, or has a broken file; or no run was evaluated on the text.
    """
    runs = read_runs(paths, text=text)
    texts = tuple(_results_of(group, runs) for group in _groups(runs))
    unevaluated = tuple(_unevaluated(runs, text=text))
    notes = (*unevaluated, *_outdated(runs), *_incomparable(runs, texts=texts))
    return Comparison(runs=runs, texts=texts, differences=_differences(runs), notes=notes, unevaluated=unevaluated)


def _groups(runs: Sequence[ComparedRun]) -> list[list[int]]:
    """Return the numbers of the runs that were evaluated on the same text, the largest group first."""
    groups: list[list[int]] = []
    for number, run in enumerate(runs):
        if run.report is None:
            continue
        for group in groups:
            first = runs[group[0]].report
            if first is not None and _compares(first, run.report):
                group.append(number)
                break
        else:
            groups.append([number])
    return sorted(groups, key=len, reverse=True)


def _compares(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two reports are of one text, and have perplexities that can be compared."""
    both = (one, other)
    if other_precision(one) != other_precision(other):
        return False
    if all("text_sha256" in report for report in both):
        same_text = is_same_text(one, other)
    else:  # one is of version 0.1.0
        same_text = one["data"] == other["data"]
    return same_text and (_same_tokenizer(one, other) or all(_has_words(report) for report in both))


def _same_tokenizer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    hashes = {report.get("tokenizer_sha256") for report in (one, other)} - {None}
    return len(hashes) < 2 and one["data"].get("tokens") == other["data"].get("tokens")


def _has_words(report: dict[str, Any]) -> bool:
    return all("word_perplexity" in result for result in report["results"])


def _results_of(group: list[int], runs: Sequence[ComparedRun]) -> TextResults:
    reports = [report for number in group if (report := runs[number].report) is not None]
    same = all(_same_tokenizer(reports[0], report) for report in reports)
    folders = [evaluation_folder(runs[number].run_dir) for number in group]
    labels = [label for each in zip(reports, folders, strict=True) if (label := label_among_equals(*each)) is not None]
    precision = other_precision(reports[0])
    suffix = "" if precision is None else f" in {precision}"
    if reports[0].get("documents_sha256") is not None:
        suffix += ", documents masked"
    return TextResults(
        text=(labels[0] if labels else text_name(reports[0])) + suffix,
        unit="perplexity" if same else "word_perplexity",
        runs=tuple(group),
        results=tuple({result_key(result): result for result in report["results"]} for report in reports),
    )


def _differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Return the keys in which the run files differ; none for a single run."""
    settings = [run.settings() for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if key not in _OWN_KEYS)
    return {key: [each.get(key) for each in settings] for key in keys if _differ(key, runs, settings)}


def _differ(key: str, runs: Sequence[ComparedRun], settings: Sequence[dict[str, Any]]) -> bool:
    """Return whether a key has several values; the same place may be spelled differently."""
    told = [(run, each[key]) for run, each in zip(runs, settings, strict=True) if key in each]
    if all(value == told[0][1] for _, value in told):
        return False
    return key not in PLACE_KEYS or len({run.place(key, value) for run, value in told}) > 1


def _unevaluated(runs: Sequence[ComparedRun], *, text: str | None) -> Iterator[str]:
    """Yield a note for each run that was not evaluated."""
    for run in runs:
        if run.report is None and run.checkpoint is None:
            broken = "" if not list_checkpoints(run.run_dir) else " that is whole"
            yield f"{run.label} has no checkpoint{broken or ' yet'}, so there is nothing to evaluate"
        elif run.report is None:
            on, options = "", ""
            if text is not None:  # a run was evaluated on it, or the text would be refused
                report = next(other.report for other in runs if other.report is not None)
                data = "" if is_held_out(report) or run.is_imported else " --data FILE"
                on, options = f" of {text}", data + _precision_option(report)
            yield f"{run.label} has no evaluation{on}: {run.evaluate_command}{options}"


def _outdated(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Yield a note for each run that was evaluated at another checkpoint than the one that is compared."""
    for run in runs:
        if run.report is not None and run.checkpoint not in (None, Path(run.report["checkpoint"]).name):
            file = run.report.get("text_path")  # version 0.1.0 did not keep it
            data = "" if is_held_out(run.report) else f" --data {typed_path(file) if file else 'FILE'}"
            at = f"at step {run.report['step']}, not at its newest checkpoint"
            options = f"{data}{_precision_option(run.report)}"
            yield f"{run.label} was evaluated {at}: trainshort evaluate {typed_path(run.path)}{options}"


def _precision_option(report: dict[str, Any]) -> str:
    precision = other_precision(report)
    return "" if precision is None else f" --precision {precision}"


def _incomparable(runs: Sequence[ComparedRun], *, texts: Sequence[TextResults]) -> Iterator[str]:
    """Yield a note for each reason why figures of the runs do not compare."""
    if len(texts) > 1:
        on = "; ".join(f"{', '.join(runs[number].label for number in text.runs)} on {text.text}" for text in texts)
        where, advice = _difference(runs)
        yield f"evaluated {where} that differ, so their perplexities do not compare: {on}. {advice}"
    for text in texts:
        if text.unit == "perplexity" and (measured := [*_of_different_tokens(text)]):
            yield f"{', '.join(measured)} on {text.text}: {DIFFERENT_TOKENS}"
    if any(text.unit == "word_perplexity" for text in texts):
        yield "the tokenizers differ: perplexities are per word, and losses, which are per token, do not compare"
    elif len({run.tokenizer_sha256 for run in runs} - {None}) > 1:
        yield "the tokenizers differ: losses, which are per token, do not compare"


def _of_different_tokens(text: TextResults) -> Iterator[str]:
    """Yield what runs with one tokenizer scored different tokens with."""
    for key in text.keys:
        found = [results[key] for results in text.results if key in results]
        # as many tokens may be others where windows end elsewhere; an older report does not say where
        scored, ends = ({result.get(name) for result in found} - {None} for name in ("tokens", "windows_end_every"))
        if len(scored) > 1 or len(ends) > 1:
            yield f"{text.protocol(key)} at {key[2]:,}"


def _difference(runs: Sequence[ComparedRun]) -> tuple[str, str]:
    """Return in what the runs' evaluations differ, and how to compare the runs."""
    reports = [run.report for run in runs if run.report is not None]
    if len({other_precision(report) for report in reports}) > 1:
        return "in precisions", _SAME_PRECISION
    texts, documents = ({report.get(f"{key}_sha256") for report in reports} for key in ("text", "documents"))
    if len(texts) == 1 and len(documents) > 1:
        return "with masked documents", f"{_advice(runs)} (text in one file is one document)"
    return "on texts", _advice(runs)


def _advice(runs: Sequence[ComparedRun]) -> str:
    """Return how to compare runs that were evaluated on different texts."""
    texts = [
        {(label, *_text_hashes(path)) for label, path in reports.items()}
        for run in runs
        if (reports := {} if run.checkpoint is None else checkpoint_reports(run.run_dir, checkpoint=run.checkpoint))
    ]
    both = set.intersection(*texts) if len(texts) == len(runs) else set()
    shared = sorted(label for label, sha256, _ in both if sha256)
    if shared:
        return f"All were evaluated on {shared[0]}: add --text {shared[0]}"
    return "Evaluate each with the same --data FILE, then compare with --text FILE"


def _text_hashes(path: Path) -> tuple[str | None, str | None]:
    report = read_report(path)
    return report.get("text_sha256"), report.get("documents_sha256")


def _run_to_json(run: ComparedRun) -> dict[str, Any]:
    report = run.report
    evaluation = None
    if report is not None:
        evaluation = {
            "report": str(run.report_path),
            "checkpoint": Path(report["checkpoint"]).name,
            "text": label_among_equals(report, evaluation_folder(run.run_dir)) or text_name(report),
            "date": report.get("date"),
        }
    return {"label": run.label, "run_dir": str(run.run_dir), "checkpoint": run.checkpoint, **run.values(),
            "evaluation": evaluation}  # fmt: skip
