"""Submission of a chain: what is frozen, the order of the jobs, what is refused. SLURM's commands are stubs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError, MachineError
from configs.files import one_writer
from configs.load import check_run
from configs.paths import chain_file, frozen_code, slurm_folder
from launch.slurm import submit
from launch.slurm.record import Chain, read_chain
from launch.slurm.script import CHAIN_JOBS
from launch.slurm.status import resume_chain
from launch.slurm.submit import freeze_run, submit_jobs, submit_run
from tests.support.command_line import Call
from tests.support.slurm import stub_commands, submitted
from training.versions import CODE, HOUSE, SOURCE, VERSIONS, check_frozen, source_code


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Create stubs of SLURM's commands, each from a line of bash."""
    return stub_commands(tmp_path / "bin", monkeypatch)


def test_each_job_starts_after_the_previous_one_succeeds(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    calls = tmp_path / "calls"
    stub(
        "sbatch", f'echo "$@" >>{calls}; echo 5 jobs wait; echo "$((200 + $(wc -l <{calls})));cluster"; echo good luck'
    )
    run_dir = submitted(run_values, tmp_path)
    jobs = submit_jobs(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN_JOBS)
    assert jobs == read_chain(run_dir).jobs == {"train": "201", "evaluate": "202", "export": "203"}
    folder, kill = run_dir / "slurm", "--kill-on-invalid-dep=yes"
    assert calls.read_text().splitlines() == [
        f"--parsable --job-name=small-train {folder}/train.sbatch",
        f"--parsable --job-name=small-evaluate --dependency=afterok:201 {kill} {folder}/evaluate.sbatch",
        f"--parsable --job-name=small-export --dependency=afterok:202 {kill} {folder}/export.sbatch",
    ]


def test_a_refused_script_cancels_the_jobs_before_it(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    run_dir = submitted(run_values, tmp_path)
    chain = read_chain(run_dir)
    stub("sbatch", 'echo "sbatch: error: no such qos" >&2; exit 1')
    with pytest.raises(MachineError, match=r"sbatch refused .*train.sbatch: no such qos: fix the slurm section"):
        submit_jobs(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN_JOBS)
    stub("sbatch", "echo Submitted batch job 7")
    with pytest.raises(MachineError, match=r"train.sbatch: it printed 'Submitted batch job 7\\n' and no job id: fix"):
        submit_jobs(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN_JOBS)
    assert read_chain(run_dir) == chain, "the record of the earlier jobs stays"
    stub("sbatch", '[[ $3 == --dep* ]] || { echo 7; exit 0; }; echo "sbatch: error: no such qos" >&2; exit 1')
    stub("scancel", f'echo "$@" >{tmp_path}/cancelled')
    with pytest.raises(MachineError, match=r"sbatch refused .*evaluate.sbatch: no such qos: fix the slurm section"):
        submit_jobs(run_dir, chain=Chain("small", {}, 2, ""), names=CHAIN_JOBS)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert read_chain(run_dir).jobs == {"train": "7"}, "an accepted job is recorded, whatever happens next"


def test_code_and_configuration_are_frozen(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    code = frozen_code(run_dir)
    assert sorted(path.name for path in code.iterdir()) == sorted([*CODE, SOURCE, VERSIONS])
    assert (code / "launch" / "local.py").read_bytes() == (HOUSE / "launch" / "local.py").read_bytes()
    assert not list(code.rglob("__pycache__"))
    assert source_code(code) == source_code() is not None
    run_values["slurm"] = {"container": "image.sqsh"}
    freeze_run(check_run(run_values, name="small"))
    assert not code.exists(), "the image has its own code"


def test_an_installed_wheel_is_frozen_like_a_checkout(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    for name in (*CODE[:-1], "torch", "training/__pycache__"):
        (installed / name).mkdir(parents=True)
        (installed / name / "module.py").write_text("here")
    (installed / CODE[-1]).touch()
    monkeypatch.setattr(submit, "HOUSE", installed)
    monkeypatch.setattr(submit, "source_code", lambda: source_code(installed))
    code = frozen_code(submitted(run_values, tmp_path))
    assert sorted(path.name for path in code.iterdir()) == sorted([*CODE, VERSIONS])
    assert [path.relative_to(code) for path in code.glob("training/**/*.py")] == [Path("training/module.py")]


def test_a_wheel_inside_another_repository_is_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "trainshort.py").touch()
    assert source_code(tmp_path) is None


def test_the_recorded_diff_restores_the_checkout(tmp_path: Path) -> None:
    def git(*arguments: str, folder: Path) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)

    checkout, again = tmp_path / "checkout", tmp_path / "again"
    (checkout / "training").mkdir(parents=True)
    (checkout / "trainshort.py").write_text("one\n")
    git("init", "-q", "-b", "topic", folder=checkout)
    git("remote", "add", "origin", "https://me:hunter2@host/our/code.git", folder=checkout)
    git("add", ".", folder=checkout)
    git("commit", "-q", "-m", "first", folder=checkout)
    (checkout / "trainshort.py").write_text("two\n")
    (checkout / "training" / "new module.py").write_text("new\n")
    (checkout / "notes.py").write_text("none of the packages' code\n")
    source = source_code(checkout)
    assert source is not None
    assert (source["branch"], source["repository"]) == ("topic", "https://host/our/code.git")
    git("clone", "-q", str(checkout), str(again), folder=tmp_path)
    (tmp_path / "diff").write_text(source["diff"])
    git("apply", str(tmp_path / "diff"), folder=again)
    files = {path.relative_to(again): path.read_text() for path in again.rglob("*.py")}
    assert files == {Path("trainshort.py"): "two\n", Path("training/new module.py"): "new\n"}
    git("checkout", "-q", "--detach", folder=checkout)
    git("remote", "remove", "origin", folder=checkout)
    source = source_code(checkout)
    assert source is not None
    assert source["branch"] is source["repository"] is None


def test_package_versions_that_changed_are_refused_by_name(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = submitted(run_values, tmp_path)
    code = frozen_code(run_dir)
    check_frozen(code)
    seen = json.loads((code / VERSIONS).read_text())
    (code / VERSIONS).write_text(json.dumps({**seen, "trainshort": "0.0.1"}))
    check_frozen(code)  # trainshort itself may change: the frozen code runs
    (code / VERSIONS).write_text(json.dumps({**seen, "torch": "2.1"}))
    check_frozen()
    for command in ("train", "evaluate", "export"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainshort", command, "--help"],
            env={**os.environ, "PYTHONPATH": str(code)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == (
            f"error: {run_dir} was submitted with other versions (torch is {seen['torch']}, was 2.1): install those, "
            "or submit it again with trainshort slurm to continue with these\n"
        )


def test_a_submission_during_another_one_is_refused(
    run_values: dict[str, Any], tmp_path: Path, trainshort: Call
) -> None:
    run_dir = submitted(run_values, tmp_path)
    before = chain_file(run_dir).read_bytes()
    with one_writer(slurm_folder(run_dir), on_wait=pytest.fail):
        answer = trainshort("jobs", "resume", str(run_dir))
    assert (answer.code, answer.error) == (
        2,
        f"error: {run_dir} is being submitted by another process: wait for it, then see "
        f"trainshort jobs status {run_dir}\n",
    )
    assert chain_file(run_dir).read_bytes() == before


def test_a_refused_submission_changes_no_frozen_file(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(run_values, tmp_path)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for name in ("sbatch", "scontrol"):
        stub(name, "exit 1")
    # In a container the ranks are checked last, by the scripts.
    monkeypatch.setattr(submit, "load_trainable", lambda config, folder: None)
    run_values["slurm"] = {"container": "image.sqsh"}
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of"):
        submit_run(check_run(run_values, name="small"), nodes=3, folder=tmp_path)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_chain_may_end_before_the_export(
    run_values: dict[str, Any], tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "load_trainable", lambda config, folder: None)
    stub("sbatch", "[[ $2 == *-train ]] && echo 101 || echo 102")
    stub("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    run_values["slurm"] = {"container": "image.sqsh", "gpus_per_node": 4}
    config, run_dir = check_run(run_values, name="small"), Path(run_values["run"]["dir"])
    assert list(submit_run(config, nodes=1, folder=tmp_path)) == ["train", "evaluate", "export"]
    jobs = {"train": "101", "evaluate": "102"}
    assert submit_run(config, nodes=1, folder=tmp_path, names=CHAIN_JOBS[:2]) == jobs
    assert read_chain(run_dir).jobs == jobs
    assert {path.stem for path in run_dir.glob("slurm/*.sbatch")} == {"train", "evaluate"}
    assert resume_chain(run_dir) == jobs, "SLURM has forgotten them, and no export was asked for"


def test_unprepared_data_is_refused_with_a_container_too(run_values: dict[str, Any], tmp_path: Path, stub: Any) -> None:
    for name in ("sbatch", "scontrol"):
        stub(name, "exit 1")
    run_values["slurm"] = {"container": "image.sqsh"}
    run_values["data"]["dir"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere.*prepare"):
        submit_run(check_run(run_values, name="small"), nodes=1, folder=tmp_path)
    assert not Path(run_values["run"]["dir"]).exists()


def test_a_folder_that_cannot_be_written_is_one_line(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.touch()
    with pytest.raises(MachineError, match=rf"run folder {run_dir} cannot be written \(Not a directory\): free space"):
        submitted(run_values, tmp_path)
