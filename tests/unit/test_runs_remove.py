"""`trainshort runs rm`: what it asks, what it refuses, and what it leaves."""

import io
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from configs.errors import InputError, MachineError
from configs.figures import byte_size
from configs.paths import average_file, chain_file, config_file, frozen_config, incarnation_file, stop_file
from launch.remove import plan_removals
from launch.slurm.query import Job
from launch.slurm.record import Chain, write_chain
from tests.support.command_line import Call, contents, refused
from tests.support.evaluation import TOKENIZER
from tests.support.run_folders import make_run, start_run
from training.averaging.record import write_origins
from training.tracking.record import RunRecord, write_record
from training.tracking.spool import SpoolWriter


class Terminal(io.StringIO):
    """Standard input on which a person types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def runs(folder: Path) -> Path:
    return folder / "runs"


def test_a_run_is_removed_after_a_yes_only(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs / "a", last=6, saved=(4, 1200))
    write_record(run, RunRecord("abc", "https://host"))
    before = contents(runs)
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    asked = trainshort("runs", "rm", "runs/a")
    assert (asked.code, asked.out) == (0, "nothing was removed\n")
    for part in ("runs/a: finished", "kB, 2 checkpoints, the newest of step 1,200", "MLflow run abc in https://host"):
        assert part in asked.error
    assert contents(runs) == before
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert trainshort("runs", "rm", "runs/a").out.startswith("removed runs/a (")
    assert [*runs.iterdir()] == []


def test_records_that_mlflow_was_not_sent_are_said(
    trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("none", 0), ("one", 1), ("more", 2000)):
        writer = SpoolWriter(make_run(runs / name), role="train", on_problem=lambda _: None)
        for _ in range(count):
            writer.put({"kind": "tags", "tags": {}, "time_ms": 1})
        writer.close()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    answer = trainshort("runs", "rm", "runs/none", "runs/one", "runs/more")
    assert [line for line in answer.error.splitlines() if "MLflow" in line] == [
        "  1 record was not sent to MLflow, which `trainshort track sync runs/one` does",
        "  2,000 records were not sent to MLflow, which `trainshort track sync runs/more` does",
    ]
    assert [line for line in answer.out.splitlines() if "MLflow" in line] == [
        "1 record was not sent to MLflow and went with it",
        "2,000 records were not sent to MLflow and went with it",
    ]


def test_what_may_still_use_a_run_is_said(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(make_run(runs / "elsewhere", last=6, saved=(6,)), machine="another", host="node7", started_at="noon")
    make_run(runs / "waiting")
    chain_file(runs / "waiting").parent.mkdir()
    chain_file(runs / "waiting").write_text("{}")
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    asked = trainshort("runs", "rm", "runs/elsewhere", "runs/waiting").error
    assert "  it was started on node7 at noon, and may still run there\n" in asked
    assert "its SLURM jobs may still wait or run: see trainshort jobs status runs/waiting\n" in asked
    assert asked.endswith("Remove 2 runs? [y/N] ")


def submit(run: Path) -> Path:
    """Record a submitted job of a run; return the folder."""
    chain_file(run).parent.mkdir()
    write_chain(run, Chain("demo", {"train": "7"}, 1, "noon"))
    return run


def test_yes_does_not_remove_what_may_be_in_use(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, elsewhere = {"process_started": 1}, {"machine": "another", "host": "node7", "started_at": "noon"}
    make_run(runs / "free", last=1, saved=(1,))
    # however far they are: evaluation may wait, and the state of a broken one is not known
    start_run(submit(make_run(runs / "stopped", last=6, saved=(6,))), **ended)
    start_run(submit(make_run(runs / "finished", last=10, saved=(10,))), **ended)
    start_run(make_run(runs / "broken", last=6, saved=(6,)), **elsewhere)
    (runs / "broken" / "config.yaml").write_text("run: [")
    start_run(make_run(runs / "complete", last=10, saved=(10,)), **elsewhere)
    incarnation_file(make_run(runs / "unreadable", last=6, saved=(6,))).write_text("nonsense")

    def refuse(chain: Chain) -> NoReturn:
        raise MachineError("scontrol is not on this machine")

    monkeypatch.setattr("launch.remove.find_jobs", refuse)
    jobs = "its SLURM jobs may still wait or run: see trainshort jobs status runs/"
    before = contents(runs)
    for name, why in {
        "stopped": f"{jobs}stopped",
        "finished": f"{jobs}finished",
        "broken": "it was started on node7 at noon, and may still run there",
        "complete": "it was started on node7 at noon, and may still run there",
        "unreadable": "runs/unreadable/incarnation cannot be read, so it may run on another machine",
    }.items():
        said = refused(trainshort, "runs", "rm", "runs/free", f"runs/{name}", "--yes")
        assert said.startswith(f"runs/{name} may be in use, {why}: make sure that it is not, then leave out --yes")
    assert contents(runs) == before
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert trainshort("runs", "rm", "runs/stopped").code == 0
    assert not (runs / "stopped").exists()


def test_slurm_is_asked_about_the_jobs_of_a_run(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submit(make_run(runs / "my run", last=6, saved=(6,)))
    state = "PENDING"
    monkeypatch.setattr("launch.remove.find_jobs", lambda chain: {"train": Job(chain.jobs["train"], state)})
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    for arguments in ((), ("--yes",)):
        assert refused(trainshort, "runs", "rm", "runs/my run", *arguments) == (
            "runs/my run has job 7 (train, PENDING): end it first, with trainshort jobs stop 'runs/my run'"
        )
    state = "COMPLETED"
    assert trainshort("runs", "rm", "runs/my run", "--yes").code == 0
    assert not run.exists()


def test_without_a_terminal_yes_is_needed(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        make_run(runs / name, last=1, saved=(1,))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "not a terminal to ask on: add --yes" in refused(trainshort, "runs", "rm", "runs/a")
    done = trainshort("runs", "rm", "runs/a", "runs/b/", "runs/../runs/a", "--yes", "-q")
    assert done.code == 0
    assert [line.split()[:2] for line in done.out.splitlines()] == [["removed", "runs/a"], ["removed", "runs/b"]]
    assert [path.name for path in runs.iterdir()] == ["c"]


def test_what_is_no_run_or_in_use_stays(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_run(runs / "good", last=1, saved=(1,))
    alive = start_run(make_run(runs / "it is alive", last=1, saved=(1,)))
    make_run(runs / "outer")
    make_run(runs / "outer" / "inner")
    (runs / "notes").mkdir()
    (runs / "notes" / "config.yaml").write_text("[")
    (runs / "link").symlink_to(good)
    (good / "data").mkdir()
    for path, why in {
        "runs": "is not a run folder",
        "runs/notes": "is not a run folder",
        "runs/good/data": "is not a run folder",
        "runs/good/checkpoints/step_0000001": "is not a run folder",
        "run.yaml": "is a file",
        "runs/nope": "does not exist",
        "runs/it is alive": f"touch '{stop_file(alive.relative_to(runs.parent))}'",
        "runs/outer": "holds another run, runs/outer/inner",
        "runs/link": f"is a link to {good}",
    }.items():
        assert why in refused(trainshort, "runs", "rm", path, "--yes")
        refused(trainshort, "runs", "rm", "runs/good", path, "--yes")  # nothing goes before all is checked
    monkeypatch.chdir(good / "data")
    assert "contains the current folder" in refused(trainshort, "runs", "rm", str(good), "--yes")


def test_a_run_that_is_read_stays(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(TOKENIZER.parents[1], runs / "old")
    shutil.copytree(run, runs / "other")
    Path("text.txt").write_text("alpha beta gamma delta epsilon zeta theta iota kappa lambda " * 99)

    def meanwhile(*_: object, **__: object) -> NoReturn:
        with pytest.raises(InputError, match="^runs/old is being read here, to evaluate or export it: stop that first"):
            plan_removals([Path("runs/old")])
        raise InputError("all was seen")

    text = ("runs/old", "--data", "text.txt", "--lengths", "400")
    two = [f"runs/{name}/checkpoints/step_0000002" for name in ("old", "other")]
    for place, *words in (
        ("evaluation.run.load_single", "evaluate", *text),
        ("retrieval.run.load_single", "retrieval", *text),
        ("export.run.compute_trained", "export", "runs/old", "--format", "hf", "--out", "hf"),
        ("averaging.average.write_weights_only", "checkpoint", "average", *two, "--out", "mean"),
    ):
        monkeypatch.setattr(f"training.{place}", meanwhile)
        answer = trainshort(*words)
        assert answer.error.splitlines()[-1] == "error: all was seen", answer
    assert trainshort("runs", "rm", "runs/old", "--yes").code == 0
    assert not run.exists()


def test_what_waits_for_mlflow_is_no_other_run(trainshort: Call, folder: Path, runs: Path) -> None:
    offline = make_run(runs / "offline", last=1, saved=(1,))
    (offline / "tracking" / "files" / "1").mkdir(parents=True)
    shutil.copy(offline / "config.yaml", offline / "tracking" / "files" / "1" / "config.yaml")
    assert trainshort("runs", "rm", "runs/offline", "--yes").code == 0
    assert not offline.exists()


def test_shared_data_and_what_links_lead_to_are_kept(
    trainshort: Call, folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = make_run(runs / "owner", last=1, saved=(1,))
    (owner / "data").mkdir()
    (owner / "data" / "manifest.json").write_text("{}")
    (owner / "data" / "part").write_bytes(bytes(1_500_000))
    size = sum(path.stat().st_size for path in owner.rglob("*") if path.is_file()) - 1_500_002
    for name in ("user", "b", "c"):
        make_run(runs / "deep" / name, "data.dir=runs/owner/data")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    (owner / "checkpoints" / "step_0000009").symlink_to(elsewhere)
    (owner / "notes.txt").symlink_to(elsewhere / "file")
    size += (owner / "notes.txt").lstat().st_size  # of the link
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    asked = trainshort("runs", "rm", "runs/owner").error.splitlines()
    assert asked[0].startswith(f"runs/owner: stopped, {byte_size(size)} without its data, 2 checkpoints")
    assert asked[1] == "  will keep runs/owner/data (1.50 MB): runs/deep/b, runs/deep/c and runs/deep/user train on it"
    for name in ("b", "c"):
        assert trainshort("runs", "rm", f"runs/deep/{name}", "--yes").code == 0
    assert trainshort("runs", "rm", "runs/owner", "--yes").out.splitlines() == [
        f"removed runs/owner except its data ({byte_size(size)})",
        "kept runs/owner/data (1.50 MB): runs/deep/user trains on it",
    ]
    assert [path.name for path in owner.iterdir()] == ["data"]
    assert (elsewhere / "file").read_text() == "kept"
    # with its user gone, the data goes too: it was searched for beside the run and in ./runs
    assert "kept runs/owner/data, which it trained on" in trainshort(
        "runs", "rm", "runs/deep/user", "--yes"
    ).out.replace(f"{folder}/", "")
    owner.rename(folder / "owner")
    gone = trainshort("runs", "rm", str(folder / "owner"), "--yes")
    assert gone.out.endswith(f"\nits data too: no other run in runs or {folder} trains on it\n")
    assert not (folder / "owner").exists()


def test_runs_that_come_from_its_checkpoints_are_named(
    trainshort: Call, folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = make_run(runs / "trunk", last=8, saved=(4, 8))
    (runs / "trunk 2").mkdir()  # a name that begins alike is another run's
    make_run(runs / "other", "train.init_from=runs/trunk 2")
    make_run(runs / "cool", "train.branch_from=runs/trunk/checkpoints/step_0000004", last=9, saved=(9,))
    make_run(runs / "deep" / "tuned", f"train.init_from={trunk}")
    write_origins(make_run(runs / "mean", saved=(8,)), [{"path": f"{trunk}/checkpoints/step_0000008", "step": 8}])
    average_file(make_run(runs / "broken", saved=(8,))).write_text("[")
    branch = ("run.dir=runs/submitted", "train.branch_from=runs/trunk/checkpoints/step_0000008")
    submitted = submit(make_run(runs / "submitted", *branch))
    config_file(submitted).rename(frozen_config(submitted))
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    come = "runs/cool, runs/deep/tuned, runs/mean and runs/submitted come from its checkpoints, without which that"
    assert f"\n  {come} cannot be done again\n" in trainshort("runs", "rm", "runs/trunk").error
    for name in ("cool", "mean"):
        assert "its checkpoints" not in trainshort("runs", "rm", f"runs/{name}", "--yes").out
    monkeypatch.chdir(runs)
    # checkpoints on another disk
    shutil.move(trunk / "checkpoints", folder / "disk")
    (trunk / "checkpoints").symlink_to(folder / "disk")
    removed = trainshort("runs", "rm", "trunk", "deep/tuned", "--yes").out
    assert "submitted comes from its checkpoints, without which that cannot be done again\n" in removed


def test_data_that_a_submitted_run_waits_for_is_kept(trainshort: Call, runs: Path) -> None:
    owner = make_run(runs / "owner", last=1, saved=(1,))
    (owner / "data").mkdir()
    user = submit(make_run(runs / "user", "data.dir=runs/owner/data"))
    config_file(user).rename(frozen_config(user))
    assert "kept runs/owner/data (0 B): runs/user trains on it\n" in trainshort("runs", "rm", "runs/owner", "--yes").out
    assert (owner / "data").is_dir()


@pytest.mark.parametrize("place", ["tokens/shared", "."])
def test_data_elsewhere_in_the_folder_is_not_lost(trainshort: Call, runs: Path, place: str) -> None:
    owner = make_run(runs / "owner", f"data.dir=runs/owner/{place}", last=1, saved=(1,))
    data = owner / place
    data.mkdir(parents=True, exist_ok=True)
    (data / "manifest.json").write_text("{}")
    user = make_run(runs / "user", f"data.dir=runs/owner/{place}")
    assert refused(trainshort, "runs", "rm", "runs/owner", "--yes") == (
        f"runs/owner holds data that {user} trains on, {data.resolve()}: move it and change data.dir there, or remove "
        "that run too"
    )
    assert "kept" not in trainshort("runs", "rm", "runs/owner", "runs/user", "--yes").out
    assert [*runs.iterdir()] == []


def test_data_of_runs_started_elsewhere_is_not_lost(
    trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = make_run(runs / "owner", last=1, saved=(1,))
    (owner / "data").mkdir()
    (owner / "data" / "manifest.json").write_text("{}")
    make_run(runs / "user", "run.dir=runs/user", "data.dir=runs/owner/data")
    monkeypatch.chdir(runs)  # a relative data.dir is none of this folder's
    assert "removed owner except its data" in trainshort("runs", "rm", "owner", "--yes").out
    assert (owner / "data" / "manifest.json").exists()
