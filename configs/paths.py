"""Files and folders of a run: the one place that knows their names."""

import os
import re
from pathlib import Path

from configs.errors import InputError
from configs.schema import RunConfig

# the same in prepared data and in a checkpoint
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"  # sentencepiece's; of the other kind there are two files
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def run_folder(config: RunConfig) -> Path:
    """Return the run folder, RUN_DIR."""
    return Path(config.run.dir)


def started_in(run_dir: Path, *, named: str) -> Path:
    """Return the folder in which a run was started, as far as a relative `run.dir` tells; else the current one.

    Args:
        run_dir: The run folder, found from here.
        named: Its `run.dir`.
    """
    # its link, as it was named, not what that points to
    place = (run_dir.resolve() if ".." in run_dir.parts else run_dir.absolute()).parts
    parts = Path(named).parts
    is_told = 0 < len(parts) < len(place) and place[-len(parts) :] == parts
    return Path(*place[: -len(parts)]) if is_told else Path()


def name_of_folder(run_dir: Path) -> str:
    """Return the name of a run that a command makes in a folder: the folder's, as far as `run.name` can hold it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", run_dir.absolute().name)


def config_file(run_dir: Path) -> Path:
    """Return the run file with every default filled in, written by the newest start."""
    return run_dir / "config.yaml"


def data_folder(config: RunConfig) -> Path:
    """Return the folder of the prepared data: `data.dir`, or RUN_DIR/data."""
    return Path(config.data.dir) if config.data.dir else own_data_folder(run_folder(config))


def own_data_folder(run_dir: Path) -> Path:
    """Return the folder of a run's prepared data where `data.dir` is not set."""
    return run_dir / "data"


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def evaluation_folder(run_dir: Path) -> Path:
    """Return the folder of a run's evaluation reports."""
    return run_dir / "evaluation"


def export_folder(run_dir: Path, *, form: str) -> Path:
    """Return the default folder for a model exported in one format."""
    return run_dir / "export" / form


def step_export_folder(run_dir: Path, *, step: int) -> Path:
    """Return the folder of a step that was exported while the run trained."""
    return run_dir / "exports" / f"step-{step:08d}"


def logs_folder(run_dir: Path) -> Path:
    """Return the folder of a run's logs."""
    return run_dir / "logs"


def hook_log(run_dir: Path) -> Path:
    """Return the file of what `track.hook` writes."""
    return logs_folder(run_dir) / "hook.log"


def rank_log(logs: Path, *, rank: int) -> Path:
    """Return the log of a rank in a folder of logs: all of its output, over all starts; rank 0's is the run's."""
    return logs / f"rank_{rank}.log"


def step_export_log(run_dir: Path, *, step: int) -> Path:
    """Return the log of the export of a step."""
    return logs_folder(run_dir) / f"export-{step:08d}.log"


def metrics_path(run_dir: Path) -> Path:
    """Return the file that has a line of JSON per step."""
    return run_dir / "metrics.jsonl"


def average_file(run_dir: Path) -> Path:
    """Return the file that says which checkpoints the weights of a run folder are the mean of."""
    return run_dir / "averaged.json"


def environment_path(run_dir: Path) -> Path:
    """Return the file that says what the newest start runs on: ranks, device, package versions, commit."""
    return run_dir / "environment.json"


def spool_folder(run_dir: Path) -> Path:
    """Return the folder of the records that were not sent to MLflow yet."""
    return run_dir / "tracking"


def reproduction_file(run_dir: Path) -> Path:
    """Return the manifest of reproduction: what decided the result of each start of a run."""
    return run_dir / "reproduce.json"


def discarded_metrics_path(run_dir: Path) -> Path:
    """Return the file of the lines of metrics.jsonl whose steps were lost: no checkpoint had them at the next start."""
    return logs_folder(run_dir) / "metrics_discarded.jsonl"


def certificates_path(run_dir: Path) -> Path:
    """Return the file that has a line of JSON per start: what it measured of its ranks' positions."""
    return run_dir / "certificates.jsonl"


def study_file(folder: Path) -> Path:
    """Return the results of the study whose folder it is, as JSON."""
    return folder / "study.json"


def incarnation_file(run_dir: Path) -> Path:
    """Return the file that identifies the newest start of a run."""
    return run_dir / "incarnation"


def rollbacks_file(run_dir: Path) -> Path:
    """Return the file that says how often training went back to a checkpoint, and what it left out then."""
    return run_dir / "rollbacks.json"


def stop_file(run_dir: Path) -> Path:
    """Return the file whose existence asks a run to save and stop."""
    return run_dir / "STOP"


def slurm_folder(run_dir: Path) -> Path:
    """Return the folder of a submission to SLURM: its scripts, and the code and run file that the jobs use."""
    return run_dir / "slurm"


def frozen_config(run_dir: Path) -> Path:
    """Return the run file as submitted to SLURM."""
    return slurm_folder(run_dir) / "config.yaml"


def frozen_code(run_dir: Path) -> Path:
    """Return the folder of the code as submitted to SLURM, with the package versions installed then."""
    return slurm_folder(run_dir) / "code"


def slurm_stop_file(run_dir: Path) -> Path:
    """Return the file that holds the number of the job that was asked to save and stop."""
    return slurm_folder(run_dir) / "stop"


def chain_file(run_dir: Path) -> Path:
    """Return the record of the submitted jobs."""
    return slurm_folder(run_dir) / "jobs.json"


def refuse_among_checkpoints(path: Path, *, name: str) -> None:
    """Refuse a place in RUN_DIR/checkpoints, from which retention removes whole folders.

    Args:
        path: Where a command is to write.
        name: The option or key that says so.
    Raises:
        InputError: it is RUN_DIR/checkpoints, or in it.
    """
    # as it is written and without links: either may lead through the folder
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for folder in (place, *place.parents):
            is_named_so = folder == checkpoints_folder(folder.parent)
            if is_named_so and (incarnation_file(folder.parent).exists() or any(folder.glob("step_*"))):
                raise InputError(
                    f"{name} {path} is in {folder}, where checkpoints are removed with all that is in them: choose "
                    f"another {name}"
                )


def check_run_folder(config: RunConfig) -> Path:
    """Return the run folder after checking that no file is in its way, and that libraries can take its name.

    A folder that holds other things is refused too: a run replaces config.yaml, and `trainshort runs rm` removes all.

    Raises:
        InputError: the run folder, or a folder above it, is a file or has a name that is not UTF-8; or it is the root,
            the home folder, or one above the current folder, unless it holds a run; or it is among checkpoints.
    """
    folder = run_folder(config)
    try:
        os.path.realpath(folder).encode()
    except UnicodeEncodeError:  # safetensors and MLflow could write there, but not read
        raise InputError(
            f"run.dir {os.path.realpath(folder)} has a name that is not UTF-8: rename the folder or set another run.dir"
        ) from None
    resolved = folder.resolve()
    is_shared = resolved in (Path("/"), Path(os.path.expanduser("~")), *Path.cwd().parents)
    if is_shared and not incarnation_file(folder).exists():
        raise InputError(
            f"run.dir must be a folder for this run alone, got {resolved}: set one such as runs/{config.run.name}"
        )
    refuse_among_checkpoints(folder, name="run.dir")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"run.dir {folder}: {path} is a file, not a folder: move it away or set another run.dir")
    return folder
