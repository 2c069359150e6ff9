"""Record of a run's submitted jobs: RUN_DIR/slurm/jobs.json."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.commands import typed_path
from configs.errors import InputError, MachineError
from configs.files import whole_file
from configs.paths import chain_file
from configs.saved import typed_run
from configs.schema_problems import first_problem
from launch.slurm.query import Job, find_job
from launch.slurm.script import job_name


@dataclass(frozen=True)
class Chain:
    """The submitted jobs of a run.

    Attributes:
        run: The run's name, which is part of the jobs' names.
        jobs: SLURM's id of each job by its name, in the order of the chain; the latest submission of each.
        nodes: Nodes of the training job.
        submitted_at: UTC time of the latest submission.
    """

    run: str
    jobs: dict[str, str]
    nodes: int
    submitted_at: str


_ADAPTER: TypeAdapter[Chain] = TypeAdapter(Chain)


def read_chain(run_dir: Path) -> Chain:
    """Return the record of a run's jobs.

    Raises:
        InputError: the folder does not exist, nothing was submitted from it, or the record is broken.
    """
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the run.dir of a run")
    try:
        return _ADAPTER.validate_json(chain_file(run_dir).read_bytes())
    except FileNotFoundError:
        # its run file, if it was trained here without SLURM
        raise InputError(
            f"{run_dir} has no submitted jobs: submit them with trainshort slurm {typed_run(run_dir)} --submit"
        ) from None
    except ValidationError as error:
        raise InputError(
            f"{chain_file(run_dir)} is broken ({first_problem(error)}): see in squeue that no job of the run is left, "
            "then remove the file and submit the run again"
        ) from None


def write_chain(run_dir: Path, chain: Chain) -> None:
    """Write the record of a run's jobs, atomically."""
    with whole_file(chain_file(run_dir)) as temporary:
        temporary.write_bytes(_ADAPTER.dump_json(chain, indent=1) + b"\n")


def find_jobs(chain: Chain) -> dict[str, Job]:
    """Return the states of a chain's jobs by name."""
    return {name: find_job(job_id, name=job_name(chain.run, name)) for name, job_id in chain.jobs.items()}


def has_active_jobs(run_dir: Path) -> bool:
    """Return whether jobs of a run run or wait, or may where SLURM does not answer; False if it is not here."""
    if not chain_file(run_dir).is_file() or shutil.which("scontrol") is None:
        return False
    try:
        return not all(job.ended for job in find_jobs(read_chain(run_dir)).values())
    except MachineError:
        return True
    except InputError:  # the record is broken
        return False


def refuse_active_jobs(run_dir: Path) -> None:
    """Refuse to submit while jobs of the run are running or waiting: two trainings would write to one folder.

    Raises:
        InputError: names the job.
    """
    if not chain_file(run_dir).is_file():
        return
    for name, job in find_jobs(read_chain(run_dir)).items():
        if not job.ended:
            raise InputError(
                f"{run_dir} has job {job.job_id} ({name}, {job.state}) already: wait for it, or end it with "
                f"trainshort jobs stop {typed_path(run_dir)}"
            )
