"""Execute a study: prepare its data once, then train and evaluate each run that is not finished, and keep its row."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.commands import override_options, typed_path
from configs.errors import InputError, MachineError
from configs.figures import counted, duration, scaled
from configs.files import one_writer
from configs.paths import chain_file, checkpoints_folder, data_folder, run_folder
from configs.study import HELD_OUT_TEXT, LoadedStudy, PlannedRun
from data_pipeline.counts import held_out_tokens
from data_pipeline.manifest import load_prepared
from data_pipeline.manifest_file import read_data_manifest
from launch.local import STOPPED_BY_HAND
from launch.study.processes import Commands, commands_until_asked
from training.checkpoint.manifest import step_folder
from training.evaluation.request import options_of_run
from training.reproduction.facts import data_facts
from training.study.progress import ProgressReader, RunProgress, expected_seconds
from training.study.rows import StudyRow, read_study_rows, write_row
from training.study.table import unwritable_study

logger = logging.getLogger(__name__)


class StudyExecution:
    """Executes a study.

    Args:
        loaded: The study.
        only: Runs to execute, by name or by label; empty for all.

    Attributes:
        progress: How far each run is, in the order of the study.
        collected: Labels of the runs whose rows were written.
    Raises:
        InputError: a run has changed since it began, a file is broken, or `only` names no run.
    """

    def __init__(self, loaded: LoadedStudy, *, only: Sequence[str]) -> None:
        names = dict.fromkeys(name for planned in loaded.runs for name in (planned.run, planned.label))
        for name in only:
            if name not in names:
                raise InputError(f"--only {name} is not a run of {loaded.study.name}: use one of {', '.join(names)}")
        self._loaded, self._reader = loaded, ProgressReader(loaded)
        self._chosen = [run for run in loaded.runs if not only or run.run in only or run.label in only]
        self.collected: list[str] = []
        self.read()

    def read(self) -> None:
        """Read the rows and how far each run is.

        Raises:
            InputError: a run has changed since it began, or a file is broken.
        """
        self._rows = read_study_rows(self._loaded.rows, study=self._loaded.study.name)
        self.progress = {planned.label: self._read(planned) for planned in self._loaded.runs}

    @property
    def chosen(self) -> list[RunProgress]:
        """The runs to execute, or those that are finished of them."""
        return [self.progress[planned.label] for planned in self._chosen]

    @property
    def rows(self) -> dict[tuple[str, int], StudyRow]:
        """The rows of the finished runs, by run and seed."""
        return self._rows

    def unprepared(self) -> list[PlannedRun]:
        """Return a run for each data folder that is needed and not prepared."""
        runs = {data_folder(planned.config): planned for planned in reversed(self._untrained())}
        return [planned for folder, planned in reversed(runs.items()) if read_data_manifest(folder) is None]

    def check(self) -> None:
        """Refuse what can be known before the data is prepared.

        Raises:
            InputError: a text is not there, or see `prepare`.
        """
        self._require_texts()
        for planned in self._untrained():
            if read_data_manifest(data_folder(planned.config)) is not None:
                self._refuse_other_data(planned)
                self._refuse_short_text(planned)

    def run(self, *, again: str) -> int:
        """Execute what is left, one run after the other; return the exit code.

        A run that fails does not keep the others from being trained. One that was submitted to SLURM is left to it.

        Args:
            again: The command that goes on.
        Returns:
            0; 130 if it was stopped; else the code of the first run that failed.
        """
        failed: dict[str, int] = {}
        self.collect()
        self._require_texts()
        with commands_until_asked() as commands:
            code = self.prepare(commands)
            for progress in [] if code else self._pending():
                self._announce(progress)
                code = self._execute(progress, commands)
                if commands.asked or code == STOPPED_BY_HAND:
                    break
                if code:
                    failed[progress.planned.label] = code
        if commands.asked or code == STOPPED_BY_HAND:
            logger.warning("stopped: finished runs are kept; to go on: %s", again)
            return STOPPED_BY_HAND
        if failed:
            logger.warning("failed: %s; what failed is said above; to go on: %s", ", ".join(failed), again)
        return next(iter(failed.values()), code)

    def collect(self) -> None:
        """Write the rows of runs that are trained and evaluated."""
        for progress in self.progress.values():
            if progress.stage == "collect":
                self._keep_row(progress.planned)

    def prepare(self, commands: Commands) -> int:
        """Prepare the data that is needed, and compare it with that of the rows; return the exit code.

        Raises:
            InputError: a row is of other data, or the held-out text is too short for the lengths.
        """
        for planned in self.unprepared():
            code = commands.run("prepare", *_run_arguments(planned, self._loaded))
            if code or commands.asked:
                return code
        for planned in self._untrained():
            self._refuse_other_data(planned)
            self._refuse_short_text(planned)
        return 0

    def _untrained(self) -> list[PlannedRun]:
        return [each.planned for each in self.chosen if each.stage == "train"]

    def _pending(self) -> list[RunProgress]:
        pending = [each for each in self.chosen if each.stage in ("train", "evaluate")]
        for each in pending:
            run_dir = run_folder(each.planned.config)
            if chain_file(run_dir).is_file():
                logger.info("%s belongs to SLURM: trainshort jobs status %s", each.planned.label, typed_path(run_dir))
        return [each for each in pending if not chain_file(run_folder(each.planned.config)).is_file()]

    def _execute(self, progress: RunProgress, commands: Commands) -> int:
        """Train and evaluate a run and write its row; return the exit code of what failed, 130 if it was stopped."""
        planned = progress.planned
        if progress.stage == "train":
            code = commands.run("train", *_run_arguments(planned, self._loaded))
            progress = self._update(planned)
            if code or commands.asked:
                return code or STOPPED_BY_HAND
            if progress.stage == "train":  # asked by a STOP file, or by a signal of its own
                logger.warning("%s was stopped at step %d", planned.label, progress.step)
                return STOPPED_BY_HAND
        for text in progress.texts if progress.stage == "evaluate" else ():
            code = commands.run("evaluate", *_evaluation_arguments(planned, text))
            if code or commands.asked:
                return code or STOPPED_BY_HAND
        if self._update(planned).stage != "collect":
            raise MachineError(
                f"{run_folder(planned.config)} has no report of all lengths: evaluate it by hand to see why"
            )
        self._keep_row(planned)
        return 0

    def _announce(self, progress: RunProgress) -> None:
        times, label = expected_seconds([*self.progress.values()]), progress.planned.label
        place = f"run {[*self.progress].index(label) + 1} of {len(self.progress)}: {label}"
        left = [times[each.planned.label] for each in self.chosen if each.stage == "train"]
        seconds, of_all = times[label], sum(each or 0.0 for each in left)
        about = f", about {duration(seconds)}; all runs: about {duration(of_all)}" if seconds else ""
        what = f"{scaled(progress.tokens_left)} tokens to train{about}" if progress.tokens_left else "to evaluate"
        logger.info("%s, %s", place, what)

    def _read(self, planned: PlannedRun) -> RunProgress:
        return self._reader.read(planned, self._rows.get((planned.run, planned.seed)))

    def _update(self, planned: PlannedRun) -> RunProgress:
        self.progress[planned.label] = self._read(planned)
        return self.progress[planned.label]

    def _keep_row(self, planned: PlannedRun) -> None:
        row = self._reader.make_row(planned)
        write_row(self._loaded.rows, row)
        self._rows[planned.run, planned.seed] = row
        self._update(planned)
        self.collected.append(planned.label)
        logger.info("%s is finished: its row is in %s", planned.label, self._loaded.rows)

    def _require_texts(self) -> None:
        """Refuse texts that are not there before hours of training."""
        if any(each.stage in ("train", "evaluate") for each in self.chosen):
            for text in self._loaded.study.texts:
                if text != HELD_OUT_TEXT and not Path(text).is_file():
                    raise InputError(f"texts has {text}, which is not a file: give one as for evaluate --data")

    def _refuse_short_text(self, planned: PlannedRun) -> None:
        """Refuse lengths that the held-out text has no window of: a larger split would change every run."""
        folder, longest = data_folder(planned.config), max(planned.config.evaluation_lengths)
        if HELD_OUT_TEXT not in self._loaded.study.texts or read_data_manifest(folder) is None:
            return
        tokens = held_out_tokens(load_prepared(planned.config.data, folder=folder))
        if tokens <= longest:
            raise InputError(
                f"lengths has {longest}, but the held-out text in {folder} has {tokens} tokens: raise data.split, add "
                "text, or use shorter lengths"
            )

    def _refuse_other_data(self, planned: PlannedRun) -> None:
        sha256 = data_facts(data_folder(planned.config)).get("sha256")
        for other in self._loaded.runs:
            row = self._rows.get((other.run, other.seed))
            before = row and row.data.get("sha256")
            if other.config.data.dir == planned.config.data.dir and before and before != sha256:
                raise InputError(
                    f"{self._loaded.rows} has {other.label} trained on other data (sha256 {before[:12]}) than that in "
                    f"{data_folder(planned.config)} ({str(sha256)[:12]}): bring the same text, or set `rows` to "
                    "another file"
                )


@contextmanager
def sole_study(loaded: LoadedStudy) -> Iterator[None]:
    """Keep other processes out of a study while the block runs.

    Raises:
        InputError: another one executes it.
        MachineError: its folder cannot be written.
    """

    def refuse() -> None:
        raise InputError(f"{loaded.folder} is being executed by another `trainshort study`: wait for it, or end it")

    with ExitStack() as stack:
        try:
            loaded.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_writer(loaded.folder, on_wait=refuse))
        except OSError as error:
            raise unwritable_study(loaded.folder, error) from None
        yield


def prepare_arguments(planned: PlannedRun, loaded: LoadedStudy) -> list[str]:
    """Return the command line that prepares a run's data."""
    return ["trainshort", "prepare", *_run_arguments(planned, loaded)]


def _run_arguments(planned: PlannedRun, loaded: LoadedStudy) -> list[str]:
    return [*override_options(planned.overrides), "--", loaded.study.base]


def _evaluation_arguments(planned: PlannedRun, text: str) -> list[str]:
    config = planned.config
    checkpoint = step_folder(checkpoints_folder(run_folder(config)), step=config.train.steps)
    data = [] if text == HELD_OUT_TEXT else ["--data", text]
    return [*options_of_run(config), *data, "--", str(checkpoint)]


def summary_line(progress: Sequence[RunProgress]) -> str:
    """Return how many runs are left, with their tokens and the time that training takes."""
    left = [each for each in progress if each.stage == "train"]
    times = [seconds for label, seconds in expected_seconds(progress).items() if seconds]
    tokens = sum(each.tokens_left for each in left)
    about = f", about {duration(sum(times))} of training" if times else "; their time is known after the first step"
    done = f"{counted(len(progress), 'run')}, {len(left)} to train"
    return f"{done}: {scaled(tokens)} tokens{about}" if left else f"{done}"
