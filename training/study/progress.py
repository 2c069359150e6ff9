"""How far each run of a study is: from its row and from its run folder alone. Imports no torch.

A run whose configuration has changed since it began is refused, whether it is finished or not.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import mul
from pathlib import Path
from typing import Any, Literal

from configs.commands import typed_path
from configs.errors import InputError
from configs.load import load_run
from configs.paths import checkpoints_folder, config_file, run_folder
from configs.schema import RunConfig
from configs.study import HELD_OUT_TEXT, LoadedStudy, PlannedRun, text_key
from training.checkpoint.manifest import list_checkpoints, model_sha256, read_manifest, step_folder
from training.checkpoint.title import named_step
from training.comparison.run import read_runs
from training.comparison.text import WantedText
from training.evaluation.kept import checkpoint_reports, read_report
from training.evaluation.results import protocol_name
from training.folder import with_fixed_branch
from training.metrics_reader import read_steps
from training.progress_lines import tokens_between
from training.reproduction.starts import recorded_starts
from training.step_columns import StepColumns
from training.study.rows import StudyRow, changed_values, deciding_values, values_sha256
from training.versions import installed_version

Stage = Literal["finished", "collect", "evaluate", "train"]
"""What is left of a run: nothing, its row, its evaluation and row, or all of it."""

_RESULT_KEYS = ("tokens", "loss", "perplexity", "standard_error")
_FIGURES = (
    *("parameters", "train_length", "steps", "tokens", "seconds", "tokens_per_second", "memory_gb"),
    *("loss", "validation_loss"),
)
_ANOTHER_NAME = "set the old values, give the run another name in the study"


@dataclass(frozen=True)
class RunProgress:
    """How far a run of a study is.

    Attributes:
        planned: The run.
        stage: What is left.
        step: Step of the newest checkpoint; 0 if there is none.
        begins_after: Step that it begins after without a checkpoint of its own: that of a branch, else 0.
        texts: Texts of which results are missing.
        row: Its row, which may lack results; None if there is none.
        tokens_per_second: Measured speed of its steps; None if it has none yet.
    """

    planned: PlannedRun
    stage: Stage
    step: int
    begins_after: int
    texts: tuple[str, ...]
    row: StudyRow | None
    tokens_per_second: float | None

    @property
    def tokens_left(self) -> int:
        """Tokens that are still to be trained on."""
        config = self.planned.config
        if self.stage != "train":
            return 0
        return tokens_between(self.step or self.begins_after, config.train.steps, config)


class ProgressReader:
    """Reads how far the runs of a study are."""

    def __init__(self, loaded: LoadedStudy) -> None:
        self._loaded = loaded
        self._wanted: dict[str, WantedText] = {}

    def read(self, planned: PlannedRun, row: StudyRow | None) -> RunProgress:
        """Return how far a run is.

        Args:
            planned: The run.
            row: Its row; None if there is none.
        Raises:
            InputError: it has begun with another configuration, or a file of it is broken.
        """
        run_dir, step = run_folder(planned.config), 0
        self._refuse_changes(planned, row)
        missing = self._missing_texts(planned, [] if row is None else self._results_in(row))
        stage: Stage = "train"
        if row is not None and not missing:
            stage = "finished"
        elif last_manifest(planned) is not None:
            results = self.results_of(planned)
            missing = self._missing_texts(planned, results)
            stage, step = "evaluate" if missing else "collect", planned.config.train.steps
        elif row is not None:
            raise InputError(
                f"{self._loaded.rows} has no results of {planned.label} on {', '.join(missing)} at all lengths, and "
                f"{run_dir} is not here to evaluate it: bring the folder, bring back a text that was changed, or "
                "remove the line to train the run again"
            )
        else:
            step = next((checkpoint.step for checkpoint in reversed(list_checkpoints(run_dir))), 0)
        begins_after = self._begins_after(planned.config)
        return RunProgress(planned, stage, step, begins_after, tuple(missing), row, _speed(planned.config, row))

    def _begins_after(self, config: RunConfig) -> int:
        """Return the step that a branch begins after, also where its trunk is still to be trained; 0 of another run."""
        if config.train.branch_from is None:
            return 0
        place = Path(config.train.branch_from)
        if (step := named_step(place)) is not None:
            return step
        planned = [each.config for each in self._loaded.runs]
        last = [each.train.steps for each in planned if run_folder(each).resolve() == place.resolve()]
        saved = [checkpoint.step for checkpoint in list_checkpoints(place)]
        return min((last or saved or [0])[-1], config.train.steps)

    def results_of(self, planned: PlannedRun) -> list[dict[str, Any]]:
        """Return the results of a run's last checkpoint, on all texts of the study."""
        run_dir, manifest = run_folder(planned.config), last_manifest(planned)
        reports = checkpoint_reports(run_dir, checkpoint=last_checkpoint(planned).name)
        results = []
        for text in self._loaded.study.texts:
            path = reports.get(text) if text == HELD_OUT_TEXT else self._wanted_text(text).find(reports)
            report = None
            if path is not None:
                with suppress(InputError):  # a broken one is moved aside by the next evaluation
                    report = read_report(path)
            if report is None or self._is_outdated(text, report.get("text_sha256"), measured=report["date"]):
                continue
            if manifest and report.get("weights_sha256") == model_sha256(manifest):
                results += [_row_result(result, report=report, text=text) for result in report["results"]]
        return results

    def _wanted_text(self, text: str) -> WantedText:
        if text not in self._wanted:
            self._wanted[text] = WantedText.of(text)  # reads the whole file
        return self._wanted[text]

    def _is_outdated(self, text: str, sha256: str | None, *, measured: str) -> bool:
        """Return whether a result is of what the file of a text held before it was changed.

        A tokenizer that changes text gives it another hash than the file's, so the file must be newer than the result
        too.
        """
        if text == HELD_OUT_TEXT or self._wanted_text(text).sha256 in (None, sha256):
            return False
        return datetime.fromtimestamp(Path(text).stat().st_mtime, UTC) > datetime.fromisoformat(measured)

    def _results_in(self, row: StudyRow) -> list[dict[str, Any]]:
        """Return the results of a row that are of the texts as they are now."""
        texts = {text_key(text): text for text in self._loaded.study.texts}
        known = [(each, texts[each["text"]]) for each in row.results if each["text"] in texts]
        return [
            each for each, text in known if not self._is_outdated(text, each["text_sha256"], measured=row.finished_at)
        ]

    def _missing_texts(self, planned: PlannedRun, results: Sequence[Mapping[str, Any]]) -> list[str]:
        config = planned.config
        wanted = {(protocol, length) for protocol in config.evaluate.protocols for length in config.evaluation_lengths}
        return [
            text
            for text in self._loaded.study.texts
            if wanted - {(each["protocol"], each["length"]) for each in results if each["text"] == text_key(text)}
        ]

    def _refuse_changes(self, planned: PlannedRun, row: StudyRow | None) -> None:
        now, run_dir = deciding_values(planned.config), run_folder(planned.config)
        if row is not None and (changes := changed_values(row.config, now)):
            raise InputError(
                f"{self._loaded.rows} has {planned.label} finished with another configuration ({'; '.join(changes)}): "
                f"{_ANOTHER_NAME}, or remove its line to train it again"
            )
        if config_file(run_dir).is_file() and (changes := changed_values(deciding_values(_begun(run_dir)), now)):
            raise InputError(
                f"{run_dir} was begun with another configuration ({'; '.join(changes)}): {_ANOTHER_NAME}, or remove "
                f"the folder with trainshort runs rm {typed_path(run_dir)}"
            )

    def make_row(self, planned: PlannedRun) -> StudyRow:
        """Return the row of a run that is trained and evaluated.

        Raises:
            InputError: a file of it is broken.
        """
        run_dir = run_folder(planned.config)
        # with the checkpoint that a branch took, where its trunk is named by its folder
        values = deciding_values(with_fixed_branch(planned.config, first=_begun(run_dir)))
        figures = read_runs([run_dir], text=None)[0].values()
        start: dict[str, Any] = next(reversed(recorded_starts(run_dir)), {})
        data, code = start.get("data", {}), start.get("code", {})
        return StudyRow(
            study=self._loaded.study.name,
            run=planned.run,
            seed=planned.seed,
            config_sha256=values_sha256(values),
            config=values,
            data={key: data.get(key) for key in ("sha256", "tokenizer_sha256", "tokens")},
            code={
                "trainshort": start.get("versions", {}).get("trainshort", installed_version("trainshort")),
                "commit": code.get("commit"),
                "changed": code.get("changed"),
            },
            device=start.get("hardware", {}).get("device"),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            figures={key: figures[key] for key in _FIGURES},
            results=self.results_of(planned),
        )


def _begun(run_dir: Path) -> RunConfig:
    return load_run(str(config_file(run_dir)))


def last_checkpoint(planned: PlannedRun) -> Path:
    """Return the folder of a run's last step, which need not exist yet."""
    return step_folder(checkpoints_folder(run_folder(planned.config)), step=planned.config.train.steps)


def last_manifest(planned: PlannedRun) -> Any:
    """Return the manifest of a run's last step; None if it is not saved, or not whole as far as sizes tell."""
    with suppress(InputError):
        return read_manifest(last_checkpoint(planned))
    return None


def _row_result(result: Mapping[str, Any], *, report: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {
        "text": text_key(text),
        "text_sha256": report.get("text_sha256"),
        **({"documents_sha256": report["documents_sha256"]} if "documents_sha256" in report else {}),
        "protocol": protocol_name(dict(result)),
        "length": result["length"],
        **{key: result[key] for key in _RESULT_KEYS if key in result},
    }


def _speed(config: RunConfig, row: StudyRow | None) -> float | None:
    """Return the tokens a second of a run's row, else of the steps that it has taken."""
    if row is not None:
        return row.figures.get("tokens_per_second")
    columns = StepColumns(("step_seconds", "tokens_per_second"), read_steps(run_folder(config)))
    seconds = columns.known("step_seconds")
    tokens = sum(map(mul, seconds, columns.known("tokens_per_second")))
    return tokens / sum(seconds) if sum(seconds) else None


def expected_seconds(progress: Sequence[RunProgress]) -> dict[str, float | None]:
    """Return how long the training that is left takes, by the run's label; None while nothing was measured.

    The speed is the run's own, else that of a run that differs in its seed alone, else the mean of those measured.
    """
    measured = [(each, each.tokens_per_second) for each in progress]
    known = [(each, speed) for each, speed in measured if speed]
    times: dict[str, float | None] = {}
    for each in progress:
        own = [speed for other, speed in known if other is each]
        same = [speed for other, speed in known if other.planned.run == each.planned.run]
        speeds = own or same or [speed for _, speed in known]
        mean = sum(speeds) / len(speeds) if speeds else None
        times[each.planned.label] = each.tokens_left / mean if mean else None
    return times
