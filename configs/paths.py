"""Where things lie in a run folder: the one place that knows the names."""

from pathlib import Path

from configs.errors import InputError
from configs.schema import RunConfig


def run_folder(config: RunConfig) -> Path:
    """Return the run folder, RUN_DIR."""
    return Path(config.run.dir)


def config_file(run_dir: Path) -> Path:
    """Return the resolved run, as its last start wrote it."""
    return run_dir / "config.yaml"


def data_folder(config: RunConfig) -> Path:
    """Return the folder of the prepared data: `data.dir`, or RUN_DIR/data."""
    return Path(config.data.dir) if config.data.dir else run_folder(config) / "data"


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def evaluation_folder(run_dir: Path) -> Path:
    """Return the folder of a run's last evaluation."""
    return run_dir / "evaluation"


def export_folder(run_dir: Path, *, form: str) -> Path:
    """Return the folder that a run's model is exported to by default."""
    return run_dir / "export" / form


def logs_folder(run_dir: Path) -> Path:
    """Return the folder of a run's logs."""
    return run_dir / "logs"


def incarnation_file(run_dir: Path) -> Path:
    """Return the file that names the newest start of a run."""
    return run_dir / "incarnation"


def stop_file(run_dir: Path) -> Path:
    """Return the file that asks a run to save and end, by being there."""
    return run_dir / "STOP"


def slurm_folder(run_dir: Path) -> Path:
    """Return the folder of what a run submitted to SLURM: the scripts, and what their jobs run."""
    return run_dir / "slurm"


def frozen_config(run_dir: Path) -> Path:
    """Return the run as it was submitted to SLURM."""
    return slurm_folder(run_dir) / "config.yaml"


def frozen_code(run_dir: Path) -> Path:
    """Return the code as it was submitted to SLURM, beside the versions that were installed then."""
    return slurm_folder(run_dir) / "code"


def slurm_stop_file(run_dir: Path) -> Path:
    """Return the file that holds the number of a submitted job which was asked to save and end."""
    return slurm_folder(run_dir) / "stop"


def chain_file(run_dir: Path) -> Path:
    """Return the record of the submitted jobs."""
    return slurm_folder(run_dir) / "jobs.json"


def check_run_folder(config: RunConfig) -> Path:
    """Return the run folder if one can be there.

    Raises:
        InputError: a file is in its place, or in the place of a folder above it.
    """
    folder = run_folder(config)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"run.dir {folder}: {path} is a file, not a folder: move it away or set another run.dir")
    return folder
