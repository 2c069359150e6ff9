"""Follow a run by its files alone: how far it is, how fast, what it last saved, and what its log warns of.

Each look reads what was written since the one before. The run may train on another machine, of which only the shared
disk is seen.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.load import check_run
from configs.path_text import require_folder
from configs.paths import (
    certificates_path,
    config_file,
    environment_path,
    incarnation_file,
    logs_folder,
    metrics_path,
    rank_log,
)
from configs.schema import RunConfig
from launch.runs import RunState, is_run_folder, name_of, run_values, state_of
from parallel.layout import Layout
from training.appended_lines import AppendedLines
from training.checkpoint.manifest import CheckpointFolder, list_checkpoints
from training.followed_log import FollowedLog
from training.followed_metrics import Curve, FollowedMetrics, mean_rate, number
from training.further_losses import fields_by_length, fields_by_source
from training.incarnation import Incarnation, newest_incarnation
from training.metrics_file import Best
from training.metrics_reader import step_fields
from training.pace import Pace

ACTIVE, ENDED = ("running", "starting", "silent"), ("finished", "stopped", "failed")
# A run counts as silent after this many seconds, steps, or longest validations and saves, whichever is longest.
QUIET_SECONDS, QUIET_STEPS, QUIET_PAUSES = 30.0, 10, 3
QUIET_STARTING_SECONDS = 300.0  # imports, compilers and checkpoints take minutes


@dataclass(frozen=True)
class RunView:
    """What the files of a run show at one instant; None stands for what they do not hold.

    Attributes:
        path: The run folder.
        name: `run.name`.
        state: As in `trainshort runs`; also `starting`, before the ranks have joined, and `silent`, on another machine
            and without a sign for long.
        is_quiet: Whether its last sign is so old that a person should look.
        silent_seconds: Since its last sign: a step, a line of the log, a checkpoint.
        host: Machine of the newest start.
        starts: How often it was started.
        started_at: When last.
        began_after: Step that the newest start continues from.
        ranks, layout: Ranks and layout of the newest start.
        step, steps: The last step, and those of the whole run.
        newest: Fields of the last step in metrics.jsonl.
        tokens_per_second, utilization, causal_utilization: Means of the recent steps of the newest start.
        seconds_left: To the end of the run, with validations and saves; None for a run that has ended.
        validation, best: The newest and the lowest validation.
        by_length, by_source: Further losses of the newest one, by length and by source.
        checkpoints, newest_checkpoint, checkpoint_seconds: Their number, the newest one's step and age.
        warnings: Warnings of the newest start, the newest last, with how often each was said; at most KEPT_WARNINGS.
        saying: The last line of the log.
        curves: Curves of the fields in CURVES, over all steps.
        problem: What cannot be read.
    """

    path: Path
    name: str | None
    state: str
    is_quiet: bool
    silent_seconds: float | None
    host: str | None
    starts: int
    started_at: datetime | None
    began_after: int
    ranks: int | None
    layout: str | None
    step: int
    steps: int | None
    newest: dict[str, Any]
    tokens_per_second: float | None
    utilization: float | None
    causal_utilization: float | None
    seconds_left: float | None
    validation: Best | None
    best: Best | None
    by_length: dict[int, float]
    by_source: dict[str, float]
    checkpoints: int
    newest_checkpoint: int | None
    checkpoint_seconds: float | None
    warnings: dict[str, int]
    saying: str
    curves: dict[str, Curve]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, without the curves."""
        last = {name: number(self.newest, name) for name in ("loss", "learning_rate", "grad_norm", "memory_gb")}
        values = {
            "path": str(self.path),
            "name": self.name,
            "state": self.state,
            "silent_seconds": self.silent_seconds,
            "host": self.host,
            "starts": self.starts,
            "restarts": max(0, self.starts - 1),
            "started_at": self.started_at and self.started_at.isoformat(timespec="seconds"),
            "ranks": self.ranks,
            "layout": self.layout,
            "step": self.step,
            "steps": self.steps,
            **last,
            "validation_loss": self.validation and self.validation.loss,
            "validation_step": self.validation and self.validation.step,
            "validation_by_length": self.by_length,
            "validation_by_source": self.by_source,
            "best_validation": self.best and self.best.loss,
            "best_validation_step": self.best and self.best.step,
            "tokens_seen": self.newest.get("tokens_seen"),
            "tokens_per_second": self.tokens_per_second,
            "model_flops_utilization": self.utilization,
            "model_flops_utilization_causal": self.causal_utilization,
            "seconds_left": self.seconds_left,
            "checkpoints": self.checkpoints,
            "newest_checkpoint": self.newest_checkpoint,
            "checkpoint_seconds": self.checkpoint_seconds,
            "failed_saves": self.newest.get("failed_saves", 0),
            "rollbacks": self.newest.get("rollbacks", 0),
            "warnings": list(self.warnings),
            "problem": self.problem,
        }
        # JSON has no nan
        return {
            name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()
        }


class RunWatcher:
    """Reads a run folder each time that `look` is called.

    Raises:
        InputError: it is not a run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._run_log = run_dir, rank_log(logs_folder(run_dir), rank=0)
        self._refuse_others()
        self._metrics, self._log = FollowedMetrics(run_dir), FollowedLog(run_dir)
        self._certificates = AppendedLines(certificates_path(run_dir))
        self._began_after = 0
        self._checkpoints: list[CheckpointFolder] = []
        self._files: dict[Path, int] = {}  # when those that are replaced as a whole were last written
        self._values: dict[str, dict[str, Any]] = {}
        self._config: RunConfig | None = None
        self._environment: dict[str, Any] = {}
        self._run_file_problem: str | None = None

    def look(self) -> RunView:
        """Return what the files show now.

        Raises:
            InputError: the folder is gone.
        """
        self._refuse_others()
        run_dir, metrics, log = self._run_dir, self._metrics, self._log
        problem = self._read()
        start, saved = newest_incarnation(run_dir), self._checkpoints[-1] if self._checkpoints else None
        step = max(metrics.newest.get("step", 0), saved.step if saved else 0)
        steps = _whole(self._values.get("train", {}).get("steps"))
        recent = metrics.steps_after(self._began_after)
        pace = metrics.pace(self._config, step=self._began_after) if self._config else None
        silent = self._silent_seconds(saved)
        is_quiet = silent is not None and silent > self._longest_silence(pace)
        known = state_of(run_dir, start=start, step=step, saved=saved.step if saved else 0, steps=steps)
        state = _state_seen(
            known, start=start, log=log, is_quiet=is_quiet, is_saved=saved is not None and saved.step == step
        )
        return RunView(
            path=run_dir,
            name=name_of(self._values),
            state="broken" if problem and state != "running" else state,
            is_quiet=is_quiet and state in ACTIVE,
            silent_seconds=silent,
            host=start.host if start else None,
            starts=start.number if start else 0,
            started_at=_instant(start) or log.started_at,
            began_after=self._began_after,
            ranks=_whole(self._environment.get("world_size")),
            layout=_layout_text(self._environment.get("layout")),
            step=step,
            steps=steps,
            newest=metrics.newest,
            tokens_per_second=mean_rate(recent, "tokens_per_second"),
            utilization=mean_rate(recent, "model_flops_utilization"),
            causal_utilization=mean_rate(recent, "model_flops_utilization_causal"),
            seconds_left=pace.seconds_left if pace and steps and step < steps and state in ACTIVE else None,
            **self._validations(),
            checkpoints=len(self._checkpoints),
            newest_checkpoint=saved.step if saved else None,
            checkpoint_seconds=_age(saved.path) if saved else None,
            warnings=dict(log.warnings),
            saying=log.newest,
            curves=metrics.curves,
            problem=problem,
        )

    def _validations(self) -> dict[str, Any]:
        """Return the newest validation, also by length and by source, and the best one."""
        validated = self._metrics.validated

        def measured(fields: Mapping[Any, str]) -> dict[Any, float]:
            known = {key: number(validated, field) for key, field in fields.items()}
            return {key: loss for key, loss in known.items() if loss is not None and isfinite(loss)}

        return {
            "validation": self._metrics.validation,
            "best": self._metrics.best,
            "by_length": measured(fields_by_length(validated)),
            "by_source": measured(fields_by_source(validated)),
        }

    def _silent_seconds(self, saved: CheckpointFolder | None) -> float | None:
        """Return the seconds since the run's last sign; None if it has given none."""
        run_dir = self._run_dir
        files = [metrics_path(run_dir), self._run_log, incarnation_file(run_dir)]
        ages = [_age(file) for file in (*files, *([saved.path] if saved else []))]
        return min((seconds for seconds in ages if seconds is not None), default=None)

    def _longest_silence(self, pace: Pace | None) -> float:
        """Return the seconds without a sign that are nothing unusual at this pace."""
        if pace is None:
            return QUIET_STARTING_SECONDS
        # In the background only the last save, or that of a stop, is without a sign: no pause before it tells how long.
        in_background = self._config is not None and self._config.checkpoint.background
        least = QUIET_STARTING_SECONDS if in_background else QUIET_SECONDS
        pause = max(self._metrics.longest_pause, pace.validation_seconds)  # the first validation is not known yet
        return max(least, QUIET_STEPS * pace.step_seconds, QUIET_PAUSES * pause)

    def _refuse_others(self) -> None:
        path = self._run_dir
        try:
            require_folder(path, what="run folder", advice="give the run.dir of a run")
            # the log alone: a first start writes it before anything else
            if not (is_run_folder(path) or metrics_path(path).exists() or self._run_log.exists()):
                raise InputError(f"{path} is not a run folder: give one that `trainshort runs` lists")
        except OSError as error:
            raise InputError(f"run folder {path} cannot be read ({error.strerror}): fix its permissions") from None

    def _read(self) -> str | None:
        """Read what was written since the last time; return what cannot be read."""
        problem = None
        parts = (self._metrics.update, self._log.update, self._list, self._read_certificates, self._read_environment)
        for read in parts:
            try:
                read()
            except OSError as error:
                problem = problem or f"{error.filename} cannot be read ({error.strerror})"
        self._read_run_file()
        return self._run_file_problem or problem

    def _list(self) -> None:
        self._checkpoints = list_checkpoints(self._run_dir)

    def _read_certificates(self) -> None:
        if self._certificates.starts_over():
            self._began_after = 0
        for line in self._certificates.read():
            step = (step_fields(line) or {}).get("step")
            self._began_after = self._began_after if step is None else step

    def _read_run_file(self) -> None:
        file = config_file(self._run_dir)
        if not self._was_written(file) and self._values:
            return
        problems: list[str] = []
        self._values, self._config = run_values(self._run_dir, problems), None
        self._run_file_problem = next(iter(problems), None)
        with suppress(InputError):  # of another version: its steps are known, the time left is not
            self._config = check_run(self._values, name=str(file)) if self._values else None

    def _read_environment(self) -> None:
        file = environment_path(self._run_dir)
        if self._was_written(file):
            with suppress(ValueError, RecursionError):  # it is being written, or damaged
                values = json.loads(file.read_text(encoding="utf-8"))
                self._environment = values if isinstance(values, dict) else {}

    def _was_written(self, file: Path) -> bool:
        """Return whether a file exists and was written since the last time."""
        try:
            written = file.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        before, self._files[file] = self._files.get(file), written
        return written != before


def _state_seen(known: RunState, *, start: Incarnation | None, log: FollowedLog, is_quiet: bool, is_saved: bool) -> str:
    """Return the state of a run, also one that starts, or of which only the disk is seen."""
    if known in ("running", "finished"):
        return known
    began = _instant(start)
    if log.started_at is not None and not log.has_ended and not is_quiet:
        # a start says so in the log before its ranks have joined, and only then becomes the newest
        if began is None or log.started_at > began:
            return "starting"
    if known != "unknown":
        return known
    if log.has_ended:
        return "stopped" if is_saved else "failed"
    return "silent" if is_quiet else "running"


def _instant(start: Incarnation | None) -> datetime | None:
    with suppress(ValueError):
        return datetime.fromisoformat(start.started_at).astimezone() if start else None
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _layout_text(sizes: Any) -> str | None:
    with suppress(TypeError):
        return str(Layout(**sizes, micro_batches=1))
    return None


def _age(path: Path) -> float | None:
    """Return the seconds since a file was written, by this machine's clock; None if there is no such file."""
    with suppress(OSError):
        return max(0.0, time.time() - path.stat().st_mtime)
    return None
