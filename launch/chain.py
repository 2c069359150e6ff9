"""Submit a run's chain of jobs, frozen as it is: train, then evaluate, then export."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import InputError, MachineError
from configs.load import dump_run
from configs.paths import (
    chain_file,
    check_run_folder,
    frozen_code,
    frozen_config,
    frozen_versions,
    logs_folder,
    run_folder,
    slurm_folder,
)
from configs.schema import RunConfig
from data_pipeline.atomic import whole_file
from launch.cluster import ask, check_limits, find_job, said
from launch.slurm import CHAIN, program_of, ranks_per_node, render
from training.folder import settle
from training.preflight import make_ready
from training.versions import HOUSE, SOURCE, installed_versions, source_code

CODE = ("configs", "parallel", "data_pipeline", "training", "launch", "trainshort.py")


@dataclass(frozen=True)
class Chain:
    """What was submitted for a run.

    Attributes:
        jobs: SLURM's number of each job by name; those of the newest submission.
        nodes: Nodes of the training job.
        submitted_at: When, UTC.
    """

    jobs: dict[str, str]
    nodes: int
    submitted_at: str


def submit_run(config: RunConfig, *, nodes: int, folder: Path) -> Chain:
    """Freeze a run into its folder and submit its jobs.

    Args:
        config: The run, overrides applied.
        nodes: Nodes of the training job.
        folder: Where the jobs start.
    Raises:
        InputError: the run cannot start, the partition cannot give what it asks for, or its jobs are there already.
        MachineError: there is no sbatch here, or it refuses a script.
    """
    if shutil.which("sbatch") is None:
        raise MachineError(
            "sbatch is not on this machine: run this on a SLURM login node, or leave out --submit to see the scripts"
        )
    check_limits(config.slurm, nodes=nodes)
    config = _settled(config, nodes=nodes)
    run_dir = run_folder(config)
    refuse_active(run_dir)
    code = freeze(config)
    scripts = render(
        config,
        run_file=str(frozen_config(run_dir)),
        nodes=nodes,
        folder=folder,
        program=program_of(config),
        code=folder / code if code else None,
    )
    for name, script in scripts.items():
        script_file(run_dir, name=name).write_text(script, encoding="utf-8")
    return submit(run_dir, names=CHAIN, nodes=nodes)


def _settled(config: RunConfig, *, nodes: int) -> RunConfig:
    """Return the run with what its first start fixed, checked as far as this machine can tell."""
    if config.slurm.container:  # what is installed here says nothing about the image
        return settle(config, run_dir=check_run_folder(config))
    ranks = nodes * ranks_per_node(config, nodes=nodes)
    return make_ready(config, world_size=ranks, device="cuda" if config.slurm.gpus_per_node else "cpu").config


def freeze(config: RunConfig) -> Path | None:
    """Write what a submitted run runs to RUN_DIR/slurm: config, versions, and the code where it is a checkout.

    Returns:
        The frozen code; None where trainshort is an installed wheel, or lies in the run's container.
    """
    run_dir = run_folder(config)
    for needed in (slurm_folder(run_dir), logs_folder(run_dir)):
        _make(needed)
    frozen_config(run_dir).write_text(dump_run(config), encoding="utf-8")
    frozen_versions(run_dir).unlink(missing_ok=True)
    code = frozen_code(run_dir)
    shutil.rmtree(code, ignore_errors=True)
    if config.slurm.container:  # what is installed here is not what will run
        return None
    frozen_versions(run_dir).write_text(json.dumps(installed_versions(), indent=1) + "\n", encoding="utf-8")
    source = source_code()
    if source is None:
        return None
    for name in CODE:
        if (HOUSE / name).is_dir():
            shutil.copytree(HOUSE / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(HOUSE / name, code / name)
    (code / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    return code


def check_frozen(config: RunConfig, *, run: str) -> None:
    """Refuse a start of a submitted run with other versions than it was submitted with.

    Args:
        config: The run.
        run: Its file; any other than the frozen one of its folder passes.
    Raises:
        MachineError: names each version that has changed.
    """
    run_dir = run_folder(config)
    if Path(run).resolve() != frozen_config(run_dir).resolve() or not frozen_versions(run_dir).is_file():
        return
    then: Mapping[str, str | None] = json.loads(frozen_versions(run_dir).read_text(encoding="utf-8"))
    now = installed_versions()
    changed = [f"{name} is {now.get(name)}, was {seen}" for name, seen in then.items() if now.get(name) != seen]
    if changed:
        raise MachineError(
            f"{run_dir} was submitted with other versions ({'; '.join(changed)}): install those, or submit it again "
            "with trainshort slurm to go on with these"
        )


def submit(run_dir: Path, *, names: Sequence[str], nodes: int) -> Chain:
    """Submit scripts of RUN_DIR/slurm, each to start when the one before has ended well, and record their numbers.

    Raises:
        MachineError: sbatch refuses one; those before it are cancelled.
    """
    jobs: dict[str, str] = {}
    for name in names:
        # Without kill-on-invalid-dep a chain whose first job failed would wait for ever.
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        path = script_file(run_dir, name=name)
        done = ask("sbatch", "--parsable", *after, str(path))
        if done.returncode:
            if jobs:
                ask("scancel", *jobs.values())
            raise MachineError(f"sbatch refused {path}: {said(done)}: mend the slurm section and submit again")
        jobs[name] = done.stdout.strip().split(";")[0]
    chain = Chain(jobs, nodes, datetime.now(UTC).isoformat(timespec="seconds"))
    with whole_file(chain_file(run_dir)) as temporary:
        temporary.write_text(json.dumps(asdict(chain), indent=1) + "\n", encoding="utf-8")
    return chain


def read_chain(run_dir: Path) -> Chain:
    """Return what was submitted for a run.

    Raises:
        InputError: there is no such folder, or nothing was submitted from it.
    """
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the run.dir of a run")
    try:
        return Chain(**json.loads(chain_file(run_dir).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{run_dir} has no submitted jobs: submit them with trainshort slurm RUN.yaml --submit"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{chain_file(run_dir)} is broken ({error}): submit the run again") from None


def refuse_active(run_dir: Path) -> None:
    """Refuse to submit beside jobs that run or wait: two trainings of one folder would spoil each other.

    Raises:
        InputError: names the job.
    """
    if not chain_file(run_dir).is_file():
        return
    for name, number in read_chain(run_dir).jobs.items():
        job = find_job(number)
        if not job.ended:
            raise InputError(
                f"{run_dir} has job {number} ({name}, {job.state}) already: wait for it, or end it with "
                f"trainshort jobs stop {run_dir}"
            )


def script_file(run_dir: Path, *, name: str) -> Path:
    """Return the script of a job."""
    return slurm_folder(run_dir) / f"{name}.sbatch"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {folder} cannot be made ({error.strerror}): choose another run.dir") from None
