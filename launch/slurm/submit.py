"""Submit a run's chain of jobs, frozen as it is: train, then evaluate, then export."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.errors import InputError, MachineError
from configs.files import one_writer, whole_file
from configs.load import dump_run
from configs.paths import (
    chain_file,
    check_run_folder,
    data_folder,
    frozen_code,
    frozen_config,
    logs_folder,
    run_folder,
    slurm_folder,
)
from configs.schema import RunConfig
from data_pipeline.counts import load_trainable
from launch.slurm.query import Job, ask, check_limits, find_job, said
from launch.slurm.script import CHAIN, image_state, job_name, program_of, ranks_per_node, render
from training.folder import with_fixed_keys, writing
from training.preflight import make_ready
from training.versions import CODE, HOUSE, SOURCE, VERSIONS, installed_versions, source_code


@dataclass(frozen=True)
class Chain:
    """What was submitted for a run.

    Attributes:
        run: The run's name, which its jobs bear.
        jobs: SLURM's number of each job by name, in the order of the chain; the newest of each.
        nodes: Nodes of the training job.
        submitted_at: When the newest were, UTC.
    """

    run: str
    jobs: dict[str, str]
    nodes: int
    submitted_at: str


def submit_run(config: RunConfig, *, nodes: int, folder: Path) -> dict[str, str]:
    """Freeze a run into its folder and submit its jobs; return their numbers by name.

    Args:
        config: The run, overrides applied.
        nodes: Nodes of the training job.
        folder: Where the jobs start.
    Raises:
        InputError: the run cannot start, the partition cannot give what it asks for, or its jobs are there already.
        MachineError: there is no sbatch here, it refuses a script, or the run folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise MachineError(
            "sbatch is not on this machine: run this on a SLURM login node, or leave out --submit to see the scripts"
        )
    check_limits(config.slurm, nodes=nodes)
    config = _settled(config, nodes=nodes)
    run_dir = run_folder(config)
    scripts = render(
        config,
        run_file=str(frozen_config(run_dir)),
        nodes=nodes,
        folder=folder,
        program=program_of(config),
        code=None if config.slurm.container else folder / frozen_code(run_dir),
        image=image_state(config),
    )
    with sole_submission(run_dir):
        refuse_active(run_dir)
        freeze(config)
        for name, script in scripts.items():
            script_file(run_dir, name=name).write_text(script, encoding="utf-8")
        return submit(run_dir, chain=Chain(config.run.name, {}, nodes, ""), names=CHAIN)


def _settled(config: RunConfig, *, nodes: int) -> RunConfig:
    """Return the run with what its first start fixed, checked as far as this machine can tell."""
    if config.slurm.container:  # what is installed here says nothing about the image
        config = with_fixed_keys(config, run_dir=check_run_folder(config))
        load_trainable(config.data, folder=data_folder(config), validates=bool(config.evaluate.every))
        return config
    ranks = nodes * ranks_per_node(config, nodes=nodes)
    return make_ready(config, world_size=ranks, device="cuda" if config.slurm.gpus_per_node else "cpu").config


@contextmanager
def sole_submission(run_dir: Path) -> Iterator[None]:
    """Hold the run folder while its jobs are submitted: a second submission would freeze and train beside this one.

    Raises:
        InputError: another process submits from this folder now.
        MachineError: the folder cannot be written.
    """

    def refuse() -> None:
        raise InputError(
            f"{run_dir} is being submitted by another process: wait for it, then see trainshort jobs status {run_dir}"
        )

    with writing(run_dir):
        for needed in (slurm_folder(run_dir), logs_folder(run_dir)):
            needed.mkdir(parents=True, exist_ok=True)
        with one_writer(slurm_folder(run_dir), on_wait=refuse):
            yield


def freeze(config: RunConfig) -> None:
    """Write to RUN_DIR/slurm what a submitted run runs: its configuration, and the code with the installed versions.

    With a container it is the configuration alone: what is installed here is not what will run.
    """
    run_dir = run_folder(config)
    frozen_config(run_dir).write_text(dump_run(config), encoding="utf-8")
    code = frozen_code(run_dir)
    if code.exists():
        shutil.rmtree(code)
    if config.slurm.container:
        return
    for name in CODE:
        whole = HOUSE / name
        for file in [path for path in whole.rglob("*") if path.is_file()] if whole.is_dir() else [whole]:
            if "__pycache__" not in file.parts:
                copy = code / file.relative_to(HOUSE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
    for file_name, content in ((VERSIONS, installed_versions()), (SOURCE, source_code())):
        if content is not None:  # an installed package has no commit
            (code / file_name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def submit(run_dir: Path, *, chain: Chain, names: Sequence[str]) -> dict[str, str]:
    """Submit scripts of RUN_DIR/slurm, each to start when the one before has ended well; return their numbers by name.

    Args:
        run_dir: The run folder.
        chain: What stays of what was submitted before; each job is added and recorded once SLURM has taken it.
        names: The jobs to submit.
    Raises:
        MachineError: sbatch refuses one; those before it are cancelled.
    """
    jobs: dict[str, str] = {}
    for name in names:
        # Without kill-on-invalid-dep a chain whose first job failed would wait for ever.
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        path = script_file(run_dir, name=name)
        # Said here, the name holds also where the environment has another one.
        done = ask("sbatch", "--parsable", f"--job-name={job_name(chain.run, name)}", *after, str(path))
        if done.returncode:
            if jobs:
                ask("scancel", *jobs.values())
            raise MachineError(f"sbatch refused {path}: {said(done)}: mend the slurm section and submit again")
        jobs[name] = done.stdout.strip().split(";")[0]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        chain = replace(chain, jobs={**chain.jobs, name: jobs[name]}, submitted_at=now)
        with whole_file(chain_file(run_dir)) as temporary:
            temporary.write_bytes(_ADAPTER.dump_json(chain, indent=1) + b"\n")
    return jobs


def read_chain(run_dir: Path) -> Chain:
    """Return what was submitted for a run.

    Raises:
        InputError: there is no such folder, or nothing was submitted from it.
    """
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the run.dir of a run")
    try:
        return _ADAPTER.validate_json(chain_file(run_dir).read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{run_dir} has no submitted jobs: submit them with trainshort slurm RUN.yaml --submit"
        ) from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{chain_file(run_dir)} is broken ({'.'.join(map(str, problem['loc']))}: {problem['msg']}): see in squeue "
            "that no job of the run is left, then remove the file and submit the run again"
        ) from None


def jobs_of(chain: Chain) -> dict[str, Job]:
    """Return where the jobs of a chain are, by name."""
    return {name: find_job(number, name=job_name(chain.run, name)) for name, number in chain.jobs.items()}


def refuse_active(run_dir: Path) -> None:
    """Refuse to submit beside jobs that run or wait: two trainings of one folder would spoil each other.

    Raises:
        InputError: names the job.
    """
    if not chain_file(run_dir).is_file():
        return
    for name, job in jobs_of(read_chain(run_dir)).items():
        if not job.ended:
            raise InputError(
                f"{run_dir} has job {job.number} ({name}, {job.state}) already: wait for it, or end it with "
                f"trainshort jobs stop {run_dir}"
            )


def script_file(run_dir: Path, *, name: str) -> Path:
    """Return the script of a job."""
    return slurm_folder(run_dir) / f"{name}.sbatch"


_ADAPTER: TypeAdapter[Chain] = TypeAdapter(Chain)
