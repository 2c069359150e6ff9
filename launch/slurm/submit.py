"""Submit a run's chain of jobs: train, then evaluate, then export. What they run is frozen in the run folder."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from configs.commands import typed_path
from configs.errors import InputError, MachineError
from configs.files import one_writer
from configs.load import dump_run
from configs.paths import (
    check_run_folder,
    data_folder,
    frozen_code,
    frozen_config,
    logs_folder,
    run_folder,
    slurm_folder,
)
from configs.schema import RunConfig
from configs.secrets import HIDDEN, hide_secrets, is_secret_variable
from data_pipeline.counts import load_trainable
from launch.slurm.query import check_partition_limits, run_slurm, slurm_error
from launch.slurm.record import Chain, refuse_active_jobs, write_chain
from launch.slurm.script import (
    CHAIN_JOBS,
    evaluation_size,
    find_program,
    image_state,
    job_name,
    ranks_per_node,
    render_scripts,
    with_tracking_secret,
)
from training.folder import report_write_errors, with_fixed_keys
from training.preflight import make_ready
from training.tracking.store import choose_store, require_known_scheme
from training.versions import CODE, HOUSE, SOURCE, VERSIONS, installed_versions, source_code


def submit_run(config: RunConfig, *, nodes: int, folder: Path, names: Sequence[str] = CHAIN_JOBS) -> dict[str, str]:
    """Freeze a run in its run folder, submit its jobs, and return their ids by name.

    Args:
        config: The run, overrides applied.
        nodes: Nodes of the training job.
        folder: Working directory of the jobs.
        names: The jobs to submit, the first ones of the chain.
    Raises:
        InputError: the run cannot start, the partition can never satisfy the request, or the run has active jobs.
        MachineError: sbatch is not on this machine or refuses a script, or the run folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise MachineError(
            "sbatch is not on this machine: run this on a SLURM login node, or leave out --submit to see the scripts"
        )
    check_partition_limits(config.slurm, nodes=nodes, evaluation_nodes=evaluation_size(config).nodes)
    config = with_tracking_secret(_check_run(config, nodes=nodes))
    job_secrets(config)  # refuses a run whose secrets are not here
    run_dir = run_folder(config)
    scripts = render_scripts(
        config,
        run_file=str(frozen_config(run_dir)),
        nodes=nodes,
        folder=folder,
        program=find_program(config),
        code=None if config.slurm.container else folder / frozen_code(run_dir),
        image=image_state(config),
    )
    # Everything that can be refused comes before the first write: a refusal leaves an earlier submission intact.
    with sole_submission(run_dir):
        refuse_active_jobs(run_dir)
        freeze_run(config)
        for name, script in scripts.items():
            if name in names:
                script_file(run_dir, name=name).write_text(script, encoding="utf-8")
            else:  # of an earlier submission: `jobs resume` submits what has a script
                script_file(run_dir, name=name).unlink(missing_ok=True)
        return submit_jobs(
            run_dir, chain=Chain(config.run.name, {}, nodes, ""), names=names, secrets=job_secrets(config)
        )


def _check_run(config: RunConfig, *, nodes: int) -> RunConfig:
    """Return the run with the keys that its first start fixed, checked as far as this machine can."""
    require_known_scheme(choose_store(config.track.uri, run_dir=run_folder(config), environ=os.environ))
    if config.slurm.container:  # the packages installed here are not those of the image
        config = with_fixed_keys(config, run_dir=check_run_folder(config))
        load_trainable(config, folder=data_folder(config))
        return config
    ranks = nodes * ranks_per_node(config, nodes=nodes)
    return make_ready(config, world_size=ranks, device="cuda" if config.slurm.gpus_per_node else "cpu").config


@contextmanager
def sole_submission(run_dir: Path) -> Iterator[None]:
    """Lock the run folder for one submission: a second one would freeze other code and train beside the first.

    Raises:
        InputError: another process is submitting from this folder.
        MachineError: the folder cannot be written.
    """

    def refuse() -> None:
        raise InputError(
            f"{run_dir} is being submitted by another process: wait for it, then see "
            f"trainshort jobs status {typed_path(run_dir)}"
        )

    with report_write_errors(run_dir):
        for needed in (slurm_folder(run_dir), logs_folder(run_dir)):
            needed.mkdir(parents=True, exist_ok=True)
        with one_writer(slurm_folder(run_dir), on_wait=refuse):
            yield


def freeze_run(config: RunConfig) -> None:
    """Copy to RUN_DIR/slurm what the jobs will run: the configuration, the code, and the installed versions.

    With a container only the configuration is frozen: the code is that of the image.
    """
    run_dir = run_folder(config)
    frozen_config(run_dir).write_text(dump_run(config), encoding="utf-8")
    code = frozen_code(run_dir)
    if code.exists():
        shutil.rmtree(code)
    if config.slurm.container:
        return
    for name in CODE:
        source = HOUSE / name
        for file in [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]:
            if "__pycache__" not in file.parts:
                copy = code / file.relative_to(HOUSE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
                if copy.suffix == ".yaml":  # a shipped run file that the user has edited
                    copy.write_text(hide_secrets(copy.read_text(encoding="utf-8")), encoding="utf-8")
    for file_name, content in ((VERSIONS, installed_versions()), (SOURCE, source_code())):
        if content is not None:  # an installed wheel has no commit
            (code / file_name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def job_secrets(config: RunConfig) -> dict[str, str]:
    """Return the secrets of `slurm.env`. Only the environment of sbatch gives them to the jobs: no file holds them.

    Raises:
        InputError: the run file is a copy without them, and this shell does not have one either.
    """
    secrets = {name: value for name, value in config.slurm.env.items() if is_secret_variable(name, value)}
    for name in [name for name, value in secrets.items() if value == HIDDEN]:
        if name not in os.environ:
            raise InputError(
                f"slurm.env.{name} is a secret that {run_folder(config)} does not hold: set it in this shell with "
                f"`export {name}=...` and start the command again"
            )
        secrets[name] = os.environ[name]
    return secrets


def submit_jobs(
    run_dir: Path, *, chain: Chain, names: Sequence[str], secrets: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Submit scripts of RUN_DIR/slurm, each to start after the previous one succeeds; return their ids by name.

    Args:
        run_dir: The run folder.
        chain: Record of earlier jobs to keep. Each new job is added to it and written as soon as SLURM accepts it.
        names: The jobs to submit.
        secrets: Variables that the jobs get from the environment of sbatch alone.
    Raises:
        MachineError: sbatch refuses a script; the jobs before it are cancelled.
    """
    jobs: dict[str, str] = {}
    for name in names:
        # Without kill-on-invalid-dep the jobs after a failed one would wait forever.
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        path = script_file(run_dir, name=name)
        # The name is given here too: SBATCH_JOB_NAME would override the one in the script.
        options = ["--parsable", f"--job-name={job_name(chain.run, name)}", *after]
        result = run_slurm("sbatch", *options, str(path), environ={**os.environ, **(secrets or {})})
        # A line of its own: "id", or "id;cluster" on a federation. Some sites print notes around it.
        ids = re.findall(r"^([0-9]+)(?:;\S+)?$", result.stdout, re.MULTILINE)
        if result.returncode or not ids:
            if jobs:
                run_slurm("scancel", *jobs.values())
            seen = slurm_error(result) if result.returncode else f"it printed {result.stdout!r} and no job id"
            raise MachineError(f"sbatch refused {path}: {seen}: fix the slurm section and submit again")
        jobs[name] = ids[-1]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        chain = replace(chain, jobs={**chain.jobs, name: jobs[name]}, submitted_at=now)
        write_chain(run_dir, chain)
    return jobs


def script_file(run_dir: Path, *, name: str) -> Path:
    """Return the script of a job."""
    return slurm_folder(run_dir) / f"{name}.sbatch"
