"""The MLflow run of a study: the parent of its runs, which MLflow shows nested below it."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from configs.paths import run_folder
from configs.secrets import hide_secrets
from configs.study import STUDY_TAG, LoadedStudy
from parallel.start import environment
from training.tracking.client import TrackingTarget, open_recorded_run, open_run, set_mlflow_defaults
from training.tracking.failures import advice_on, reason_of
from training.tracking.record import read_record
from training.tracking.store import DEFAULT_EXPERIMENT, EXPERIMENT_VARIABLE, choose_store

_PARENT_TAG = "mlflow.parentRunId"  # by which MLflow nests runs

logger = logging.getLogger(__name__)


def nest_study(loaded: LoadedStudy, *, files: Sequence[Path]) -> None:
    """Make or reopen the parent of a study's runs, and nest below it those that are here. Never raises.

    Args:
        loaded: The study.
        files: Its table and figure.
    """
    recorded = [run for run in loaded.runs if read_record(run_folder(run.config)) is not None]
    if not recorded:
        return  # all of its rows are from another machine
    set_mlflow_defaults()
    config = recorded[0].config
    target = TrackingTarget(
        run_dir=loaded.folder,
        name=loaded.study.name,
        experiment=config.track.experiment or environment().get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT,
        store=choose_store(config.track.uri, run_dir=run_folder(config), variables=environment()),
        began_ms=time.time_ns() // 1_000_000,
    )
    try:
        _nest(target, [run_folder(run.config) for run in recorded], files=files)
    except Exception as error:  # noqa: BLE001  whatever MLflow raises, the study is done
        text = (
            f"MLflow at {target.store.public_uri} does not take the study ({reason_of(error)}): its runs are not "
            f"nested there; {advice_on(error, store=target.store)}"
        )
        logger.warning("%s", hide_secrets(text, known=target.store.secrets(environment())))


def _nest(target: TrackingTarget, run_dirs: Sequence[Path], *, files: Sequence[Path]) -> None:
    parent = open_run(target)
    parent.record(is_open=True)
    parent.set_tags({STUDY_TAG: target.name})
    for file in files:
        parent.log_artifact(file, folder=None)
    record = read_record(target.run_dir)
    assert record is not None, "it has just been written"
    for run_dir in run_dirs:
        with suppress(LookupError):  # deleted from the store
            open_recorded_run(replace(target, run_dir=run_dir)).set_tags({_PARENT_TAG: record.run_id})
    parent.terminate("FINISHED")
