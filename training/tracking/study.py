"""The MLflow run of a study: the parent of its runs, which MLflow shows nested below it."""

from collections.abc import Sequence
from pathlib import Path

from configs.paths import run_folder
from configs.study import STUDY_TAG, LoadedStudy
from parallel.start import environment
from training.tracking.events import PARENT_TAG
from training.tracking.record import read_record
from training.tracking.store import choose_store
from training.tracking.tracker import MlflowTracker, attached


def nest_study(loaded: LoadedStudy, *, files: Sequence[Path]) -> None:
    """Make or reopen the parent of a study's runs, and nest below it those that are here. Never raises.

    While MLflow cannot be reached, the parent waits in the study's folder; the next call nests the runs.

    Args:
        loaded: The study.
        files: Its table, and its figure if there is one.
    """
    recorded = [run.config for run in loaded.runs if read_record(run_folder(run.config)) is not None]
    if not recorded:
        return  # all of its rows are from another machine
    track = recorded[0].track
    store = choose_store(track.uri, run_dir=run_folder(recorded[0]), environ=environment())
    parent = MlflowTracker(
        loaded.folder, name=loaded.study.name, experiment=track.experiment, uri=store.uri, offline=track.offline
    )
    first, *others = files
    parent.start({}, first, tags={STUDY_TAG: loaded.study.name})
    for file in others:
        parent.artifact(file)
    parent.finish("FINISHED")
    record = read_record(loaded.folder)
    if record is None:
        return
    for config in recorded:
        with attached(run_folder(config), uri=config.track.uri, offline=track.offline) as run:
            if run is not None:
                run.put({"kind": "tags", "tags": {PARENT_TAG: record.run_id}})
