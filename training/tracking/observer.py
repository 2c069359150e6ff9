"""Observer that sends each step to MLflow."""

from pathlib import Path

from configs.paths import config_file
from configs.schema import RunConfig
from training.observers import Status, StepResult
from training.tracking.tracker import MlflowTracker


class TrackingObserver:
    """Log a run to MLflow: parameters, config and certificate at the start, metrics at each step."""

    def __init__(self, config: RunConfig, *, run_dir: Path, certificate: Path) -> None:
        self._tracker = MlflowTracker(
            run_dir, name=config.run.name, experiment=config.track.experiment, uri=config.track.uri
        )
        self._tracker.start(config.model_dump(mode="json"), config_file(run_dir))
        self._tracker.artifact(certificate)

    @property
    def summary(self) -> str:
        """Where the run is logged, in one line."""
        return self._tracker.summary

    def on_step(self, result: StepResult) -> None:
        """Queue the step's values; the tracker's thread sends them."""
        self._tracker.metrics(result.step, result.values())

    def before_save(self) -> None:
        """Do nothing: a save must not wait for a server that may be down."""

    def close(self, status: Status) -> None:
        """Send the rest and end the MLflow run with this status; a superseded start leaves the run to the newer one."""
        if status == "SUPERSEDED":
            return
        self._tracker.finish(status)
