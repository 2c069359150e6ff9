"""Read what a run folder says of its run, to compare it with others. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from configs.commands import typed_path
from configs.errors import InputError
from configs.load import load_run
from configs.path_text import require_folder
from configs.paths import MANIFEST_NAME, config_file, own_data_folder, started_in
from configs.schema import RunConfig
from configs.step_sizes import size_of
from training.checkpoint.manifest import (
    CONFIG_NAME,
    Manifest,
    candidate_folders,
    is_checkpoint_name,
    list_checkpoints,
    read_manifest,
)
from training.comparison.text import WantedText
from training.evaluation.kept import HELD_OUT, checkpoint_reports, newest_report, read_report
from training.families.table import parameter_count
from training.folder import CHECKPOINT_KEYS, with_dotted_keys
from training.further_losses import PREFIX, fields_by_length, fields_by_source
from training.metrics_reader import STEP_TIMES, read_steps
from training.step_columns import StepColumns

# what comparisons and pages show of steps
STEP_FIELDS = (
    "step",
    "tokens_seen",
    "loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "tokens_per_second",
    "model_flops_utilization",
    "memory_gb",
    "attention_density",
    "energy_joules",
    "failed_saves",
    *STEP_TIMES,
)

# keys that name a place, which may be spelled differently
PLACE_KEYS = ("data.dir", "data.tokenizer", *CHECKPOINT_KEYS)
# what the run file of an imported model says of it: the rest are values that an import has no others for
_OF_IMPORTED = ("model.", "data.vocab_size", "data.sequence_length")

_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        label: Its name, distinct from the others'.
        path: The run folder or checkpoint, as given.
        run_dir: The run folder.
        checkpoint: Name of the checkpoint that is compared: the given or the newest one; None if there is none.
        config: The run file of the newest start, or of the given checkpoint.
        manifest: Manifest of the compared checkpoint; None if it cannot be read.
        steps: Results of its steps up to the given checkpoint, as in metrics.jsonl.
        report_path: The report of an evaluation; None if there is none.
        report: Its contents.
    """

    label: str
    path: Path
    run_dir: Path
    checkpoint: str | None
    config: RunConfig
    manifest: Manifest | None
    steps: StepColumns
    report_path: Path | None
    report: dict[str, Any] | None

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer; None if unknown."""
        return None if self.manifest is None else self.manifest.tokenizer_sha256

    @property
    def train_length(self) -> int:
        """Tokens of a sequence of the checkpoint's step, or without one the last, as train.length_warmup cut them."""
        step = self.manifest.step if self.manifest else self.steps.last("step")
        return size_of(int(step or 0), self.config).length

    @property
    def is_imported(self) -> bool:
        """Whether its model was trained elsewhere: it has no held-out text, and its run file's steps say nothing."""
        return self.manifest is not None and self.manifest.step == 0

    def _validated(self, fields: Mapping[_Key, str]) -> dict[_Key, float]:
        """Return what the last validation measured of some fields, by what they are of."""
        measured = [step for step in self.steps.rows("validation_loss", *fields.values()) if step[0] is not None]
        losses = measured[-1][1:] if measured else (None,) * len(fields)
        return {key: loss for key, loss in zip(fields, losses, strict=True) if loss is not None}

    @property
    def evaluate_command(self) -> str:
        """The command that evaluates it."""
        return f"trainshort evaluate {typed_path(self.path)}{' --data FILE' if self.is_imported else ''}"

    def settings(self) -> dict[str, Any]:
        """Return the keys of its run file that say something of it, `section.key`, without secrets."""
        keys = with_dotted_keys(self.config.model_dump(mode="json"))  # the JSON form holds no secrets
        return {key: keys[key] for key in keys if not self.is_imported or key.startswith(_OF_IMPORTED)}

    def place(self, key: str, value: str | None) -> Path | None:
        """Return the place that the value of one of `PLACE_KEYS` names; None for none."""
        if value is None:
            return own_data_folder(self.run_dir).resolve() if key == "data.dir" else None
        return (started_in(self.run_dir, named=self.config.run.dir) / value).resolve()

    def values(self) -> dict[str, Any]:
        """Return the figures of a comparison by name; None where unknown."""
        losses, validations = self.steps.known("loss"), self.steps.known("validation_loss")
        seconds = [value for time in STEP_TIMES for value in self.steps.known(time)]
        vocab_size = self.manifest.vocab_size if self.manifest else self.config.data.vocab_size
        return {
            "position": self.config.model.position,
            "train_length": self.train_length,
            "parameters": parameter_count(self.config.model, vocab_size=vocab_size),
            "step": self.steps.last("step") if self.steps else self.manifest.step if self.manifest else 0,
            "steps": 0 if self.is_imported else self.config.train.steps,
            "tokens": self.steps.last("tokens_seen"),
            "loss": losses[-1] if losses else None,
            "best_loss": min(losses, default=None),
            "validation_loss": validations[-1] if validations else None,
            "best_validation_loss": min(validations, default=None),
            "validation_by_length": self._validated(fields_by_length(self.steps.fields)),
            "validation_by_source": self._validated(fields_by_source(self.steps.fields)),
            "tokens_per_second": _median(self.steps.known("tokens_per_second")),
            "model_flops_utilization": _median(self.steps.known("model_flops_utilization")),
            "memory_gb": max(self.steps.known("memory_gb"), default=None),
            "seconds": sum(seconds) if seconds else None,
        }


def read_runs(paths: Sequence[Path], *, text: str | None) -> tuple[ComparedRun, ...]:
    """Read run folders and checkpoints; one that is given twice counts once.

    Args:
        paths: Run folders, or checkpoints in them.
        text: Label or file of the text whose reports to take; None for the held-out text.
    Raises:
        InputError: one holds no run, or has a broken file; or no run was evaluated on the text, or on several of its
            name.
    """
    wanted = None if text is None else WantedText.of(text)
    runs = {(run.run_dir.resolve(), run.checkpoint): run for run in (_read_run(path, text=wanted) for path in paths)}
    if text is not None and all(run.report is None for run in runs.values()):
        names = sorted({label for run in runs.values() for label in _kept_reports(run.run_dir, run.checkpoint)})
        have = f"there are {', '.join(names)}" if names else "they have no evaluation yet"
        raise InputError(
            f"--text {text}: no run was evaluated on it, {have}: give the name of a text that was, or run "
            "`trainshort evaluate RUN_DIR --data FILE`"
        )
    return _with_labels([*runs.values()])


def _read_run(path: Path, *, text: WantedText | None) -> ComparedRun:
    require_folder(path, what="run", advice="give a run folder, or a checkpoint in one")
    # what is given may be a link
    is_checkpoint = is_checkpoint_name(path.resolve().name) or (path / MANIFEST_NAME).is_file()
    if is_checkpoint:
        (folder,) = candidate_folders(path)
        newest: tuple[Path, Manifest] | None = (folder, read_manifest(folder))
        run_dir, config = folder.parent.parent, load_run(str(folder / CONFIG_NAME))
    else:
        run_dir, config, newest = path, _run_file(path), _newest_checkpoint(path)
    name, manifest = (newest[0].name, newest[1]) if newest else (None, None)
    last = manifest.step if manifest and is_checkpoint else None
    taken = (step for step in read_steps(run_dir) if last is None or step["step"] <= last)
    report_path = _choose_report(run_dir, checkpoint=name, is_given=is_checkpoint, text=text)
    return ComparedRun(
        label=config.run.name,
        path=path,
        run_dir=run_dir,
        checkpoint=name,
        config=config,
        manifest=manifest,
        steps=StepColumns(STEP_FIELDS, taken, prefix=PREFIX),
        report_path=report_path,
        report=None if report_path is None else read_report(report_path),
    )


def _run_file(run_dir: Path) -> RunConfig:
    files = [config_file(run_dir), *(each.path / CONFIG_NAME for each in reversed(list_checkpoints(run_dir)))]
    for file in files:
        if file.is_file():
            return load_run(str(file))
    raise InputError(f"{run_dir} holds no run, there is no {files[0].name} in it: give a run.dir that was trained in")


def name_of_run(run_dir: Path) -> str | None:
    """Return the name of the run in a folder; None if there is none, or if it cannot be read."""
    with suppress(InputError, OSError):
        return _run_file(run_dir).run.name
    return None


def _newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that is whole as far as sizes tell."""
    for folder in reversed(list_checkpoints(run_dir)):
        with suppress(InputError):  # `checkpoint verify` tells what is wrong with it
            return folder.path, read_manifest(folder.path)
    return None


def _choose_report(run_dir: Path, *, checkpoint: str | None, is_given: bool, text: WantedText | None) -> Path | None:
    """Return the report of a checkpoint's text; for a run folder without it, that of an earlier checkpoint.

    Without a text: the held-out text's, else that of the run's newest evaluation.
    """
    if text is not None:
        return text.find(_kept_reports(run_dir, checkpoint, earlier=not is_given))
    reports = _kept_reports(run_dir, checkpoint, earlier=False)
    if HELD_OUT in reports:
        return reports[HELD_OUT]
    if is_given:
        return max(reports.values(), key=lambda path: path.stat().st_mtime, default=None)
    return newest_report(run_dir)


def _kept_reports(run_dir: Path, checkpoint: str | None, *, earlier: bool = True) -> dict[str, Path]:
    """Return a checkpoint's reports by the label of their text, then those on other texts of earlier checkpoints."""
    names = [] if checkpoint is None else [checkpoint]
    names += [each.path.name for each in reversed(list_checkpoints(run_dir))] if earlier else []
    reports: dict[str, Path] = {}
    for name in names:
        reports = checkpoint_reports(run_dir, checkpoint=name) | reports
    return reports


def _with_labels(runs: list[ComparedRun]) -> tuple[ComparedRun, ...]:
    """Return the runs with distinct labels: the name, else the end of the folder's path; then the step."""
    folders = {run.run_dir.resolve(): run.config.run.name for run in runs}
    labels = dict(folders)
    depth = 0
    while len(set(labels.values())) < len(labels):
        depth += 1
        shared = {label for label in labels.values() if [*labels.values()].count(label) > 1}
        for folder, label in labels.items():
            if label in shared:
                labels[folder] = "/".join(folder.parts[-depth:])
    named = [(run, labels[run.run_dir.resolve()]) for run in runs]
    of_one_folder = {label for _, label in named if [other for _, other in named].count(label) > 1}
    return tuple(
        replace(run, label=f"{label} {run.checkpoint}" if label in of_one_folder else label) for run, label in named
    )


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
