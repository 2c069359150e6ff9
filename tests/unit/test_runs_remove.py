"""`trainshort runs rm`: what it asks, what it refuses, and what it leaves."""

import io
import sys
from pathlib import Path

import pytest

from configs.paths import chain_file
from tests.support.command_line import Call, contents, refused
from tests.support.run_folders import make_run, start_run
from training.tracking.record import RunRecord, write_record


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


def test_without_a_terminal_yes_is_needed(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        make_run(runs / name, last=1, saved=(1,))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "nobody can be asked: add --yes" in refused(trainshort, "runs", "rm", "runs/a")
    done = trainshort("runs", "rm", "runs/a", "runs/b/", "runs/../runs/a", "--yes", "-q")
    assert done.code == 0
    assert [line.split()[:2] for line in done.out.splitlines()] == [["removed", "runs/a"], ["removed", "runs/b"]]
    assert [path.name for path in runs.iterdir()] == ["c"]


def test_what_is_no_run_or_in_use_stays(trainshort: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_run(runs / "good", last=1, saved=(1,))
    start_run(make_run(runs / "alive", last=1, saved=(1,)))
    make_run(runs / "outer")
    make_run(runs / "outer" / "inner")
    (runs / "notes").mkdir()
    (runs / "notes" / "config.yaml").write_text("[")
    (runs / "link").symlink_to(good)
    (good / "data").mkdir()
    for path, why in {
        "runs": "is no run folder",
        "runs/notes": "is no run folder",
        "runs/good/data": "is no run folder",
        "runs/good/checkpoints/step_0000001": "is no run folder",
        "run.yaml": "is a file",
        "runs/nope": "does not exist",
        "runs/alive": "runs here (process",
        "runs/outer": "holds another run, runs/outer/inner",
        "runs/link": f"is a link to {good}",
    }.items():
        assert why in refused(trainshort, "runs", "rm", path, "--yes")
        refused(trainshort, "runs", "rm", "runs/good", path, "--yes")  # nothing goes before all is checked
    monkeypatch.chdir(good / "data")
    assert "holds the current folder" in refused(trainshort, "runs", "rm", str(good), "--yes")


def test_shared_data_and_what_links_lead_to_are_kept(trainshort: Call, folder: Path, runs: Path) -> None:
    owner = make_run(runs / "owner", last=1, saved=(1,))
    (owner / "data").mkdir()
    (owner / "data" / "manifest.json").write_text("{}")
    user = make_run(runs / "deep" / "user", "data.dir=runs/owner/data")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    (owner / "checkpoints" / "step_0000009").symlink_to(elsewhere)
    (owner / "notes.txt").symlink_to(elsewhere / "file")
    removed = trainshort("runs", "rm", "runs/owner", "--yes").out
    assert f"kept runs/owner/data: {user} trains on it" in removed
    assert [path.name for path in owner.iterdir()] == ["data"]
    assert (elsewhere / "file").read_text() == "kept"
    # with its user gone, the data goes too
    assert "kept runs/owner/data, which it trained on" in trainshort(
        "runs", "rm", "runs/deep/user", "--yes"
    ).out.replace(f"{folder}/", "")
    assert trainshort("runs", "rm", "runs/owner", "--yes").code == 0
    assert not owner.exists()
