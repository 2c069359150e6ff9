"""Observer that sends each step to MLflow."""

from dataclasses import fields
from pathlib import Path

from configs.figures import JOULES_PER_KWH
from configs.paths import config_file, environment_path, reproduction_file
from configs.schema import RunConfig
from training.energy import spent_joules
from training.observers import Observer, Status, StepResult
from training.rollbacks import last_step_taken_again
from training.tracking.inputs import data_inputs, inputs_event
from training.tracking.names import (
    BY_NAME,
    METRIC_NAMES,
    TOTAL_ENERGY,
    name_over_tokens,
    run_params,
    run_tags,
    tags_of_starts,
    tracked_name,
)
from training.tracking.system import SystemMetrics, wait_for_other_nodes
from training.tracking.tracker import MlflowTracker

# the newer start sends what is left
_SUPERSEDED_SECONDS = 2.0


class TrackingObserver(Observer):
    """Log a run to MLflow: parameters, files and tags at the start, metrics at each step, and what the node does."""

    def __init__(self, config: RunConfig, *, run_dir: Path, certificate: Path) -> None:
        unnamed = sorted({field.name for field in fields(StepResult)} - {"step", *BY_NAME, *METRIC_NAMES})
        assert not unnamed, f"add to METRIC_NAMES in training/tracking/names.py what MLflow calls {', '.join(unnamed)}"
        self._tracker = MlflowTracker(
            run_dir,
            name=config.run.name,
            experiment=config.track.experiment,
            uri=config.track.uri,
            offline=config.track.offline,
        )
        params = run_params(config, environment_file=environment_path(run_dir), certificate=certificate)
        tags = {**run_tags(environment_path(run_dir)), **config.track.tags}
        self._tracker.start(params, config_file(run_dir), tags=tags, listed_tags=tags_of_starts(run_dir))
        for file in (certificate, environment_path(run_dir), reproduction_file(run_dir)):
            if file.is_file():
                self._tracker.artifact(file)
        self._tracker.put(inputs_event(data_inputs(config)))
        self._run_dir, self._taken_again = run_dir, last_step_taken_again(run_dir)
        self._joules = spent_joules(run_dir)
        self._system = SystemMetrics(self._tracker.put)

    @property
    def summary(self) -> str:
        """Where the run is logged, in one line."""
        return self._tracker.summary

    def on_step(self, result: StepResult) -> None:
        """Queue the step's values; the tracker's thread sends them."""
        measured = result.values()
        values = {tracked_name(name): value for name, value in measured.items()}
        if result.energy_joules is not None:
            self._joules += result.energy_joules
            values[TOTAL_ENERGY] = self._joules / JOULES_PER_KWH
        # Steps that were taken again after a rollback have other values, after a kill the same.
        again = result.step <= self._taken_again
        self._tracker.metrics(result.step, values, again=again)
        by_tokens = {over: loss for name, loss in measured.items() if (over := name_over_tokens(name))}
        self._tracker.metrics(result.tokens_seen, by_tokens, again=again)

    def on_rollback(self, step: int) -> None:
        """Log the later steps again."""
        self._taken_again = last_step_taken_again(self._run_dir)

    def before_save(self) -> None:
        """Flush the spool: a resume from the checkpoint would not train its steps again."""
        self._tracker.flush()

    def close(self, status: Status) -> None:
        """Send the rest and end the MLflow run with this status; a superseded start leaves the run to the newer one."""
        self._system.stop()
        if status == "SUPERSEDED":
            self._tracker.close(wait_seconds=_SUPERSEDED_SECONDS)
            return
        if status != "FAILED":  # else a node may be lost
            wait_for_other_nodes(self._run_dir)
        self._tracker.finish(status)
