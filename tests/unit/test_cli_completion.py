"""What the shell is told when a user presses TAB: bash, zsh and fish ask the program itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import RUNS
from tests.support.command_line import Call, run_here
from tests.support.run_folders import make_run

Complete = Callable[[str], list[str]]
SHIPPED = sorted(path.stem for path in RUNS.glob("*.yaml"))


@pytest.fixture
def complete(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """Ask as bash does: the words so far, the last of them unfinished."""

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_TRAINSHORT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        run_here()
        shown = capsys.readouterr()
        assert shown.err == ""
        return [line for line in shown.out.splitlines() if line]

    return ask


def test_commands_and_options_are_completed(complete: Complete) -> None:
    assert {"check", "train", "evaluate", "runs", "checkpoint"} <= {*complete("trainshort ")}
    assert complete("trainshort chec") == ["check", "checkpoint"]
    assert complete("trainshort checkpoint v") == ["verify"]
    assert complete("trainshort runs ") == ["list", "rm"]
    assert complete("trainshort train demo --ra") == ["--ranks"]
    assert {"--quiet", "--verbose", "--set", "--help"} <= {*complete("trainshort -q train demo --")}
    assert {"--version", "--quiet", "--install-completion"} <= {*complete("trainshort --")}


def test_run_files_are_completed(complete: Complete, folder: Path) -> None:
    for name in ("my.yaml", "notes.txt", "two words.yaml", ".hidden.yaml", "sub/inner.yml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for command in ("check", "prepare", "train", "slurm", "doctor --alibi"):
        assert complete(f"trainshort {command} ") == sorted([*SHIPPED, "my.yaml", "run.yaml", "two\\ words.yaml"])
    assert complete("trainshort train m") == ["my.yaml"]
    assert complete("trainshort train ./m") == ["./my.yaml"]
    assert complete("trainshort train sub/") == ["sub/inner.yml"]
    assert complete("trainshort train 'two") == ["two words.yaml"], "bash adds the quote"
    assert complete("trainshort train nothing/") == []  # the shell completes paths itself


def test_run_folders_and_checkpoints_are_completed(complete: Complete, folder: Path) -> None:
    make_run(folder / "runs" / "a", last=2, saved=(1, 2))
    make_run(folder / "here", last=1)
    (folder / "runs" / "other").mkdir()
    of_checkpoints = [f"checkpoint {name}" for name in ("list", "verify", "average")]
    for command in ("evaluate", "generate", "export", *of_checkpoints, "runs rm", "jobs status"):
        assert complete(f"trainshort {command} ") == ["here", "runs/a"]
        assert complete(f"trainshort {command} runs/") == ["runs/a"]
    checkpoints = [f"runs/a/checkpoints/step_000000{step}" for step in (1, 2)]
    assert complete("trainshort evaluate runs/a/") == checkpoints
    assert complete("trainshort export runs/a/checkpoints/step_") == checkpoints
    assert complete(f"trainshort checkpoint average {checkpoints[0]} runs/a/") == checkpoints
    assert complete("trainshort jobs status runs/a/") == []


def test_choices_are_completed(complete: Complete) -> None:
    assert "hf" in complete("trainshort export run --format ")
    assert complete("trainshort evaluate run --protocol n") == ["nonoverlapping"]
    assert complete("trainshort evaluate run --protocol s") == ["sliding:"]


def test_a_wrong_word_before_shows_no_error(complete: Complete) -> None:
    assert complete("trainshort evaluate $NOT_SET --len") == ["--lengths"]
    assert complete("trainshort train demo --ranks none --acc") == ["--accept-change"]
    assert complete("trainshort -q -v train --acc") == ["--accept-change"]
    assert complete("trainshort nonsense ") in ([], complete("trainshort "))


def test_other_shells_get_their_own_form(trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "two words.yaml").touch()
    monkeypatch.setenv("_TRAINSHORT_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "trainshort train two")
    assert '"two words.yaml"' in trainshort().out, "zsh quotes what it puts into its line"
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "trainshort train dem")
    assert '"demo"' in trainshort().out
    monkeypatch.setenv("_TRAINSHORT_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert trainshort().out == "demo\n"
    for shell, word in {
        "bash": "complete -o default",
        "zsh": "#compdef trainshort",
        "fish": "complete --command",
    }.items():
        monkeypatch.setenv("_TRAINSHORT_COMPLETE", f"source_{shell}")
        if shell != "bash":  # it asks bash for its version
            assert word in trainshort().out
