"""Output: text that a user wants as data is written as it is, in any encoding and to any reader."""

import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from configs.errors import first_line
from tests.support.command_line import Answer, Call, refused, run_here
from tests.support.data import BOOK
from tests.support.small_run import ONE_RANK, small_run
from training.generation import GeneratedText

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
# What rich reads as colours, as an emoji, as a link, and what it drops.
MARKUP = "[red]x[/] :smile: [link=a]b [[c] \\[d]"
TEXT = f"{MARKUP} \ttab  \f \x1b[31mred \r\n  end  \n"


@pytest.fixture
def run_dir(folder: Path) -> Path:
    """A trained run in a folder whose name is markup, relative to the working directory."""
    run_dir = Path(f"a {MARKUP.replace('/', '')} €") / f"{'long' * 40}"
    shutil.copytree(OLD_RUN, run_dir)
    return run_dir


def test_paths_in_tables_and_messages_are_unchanged(trainshort: Call, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step_0000002"
    for command in ("list", "verify"):
        answer = trainshort("checkpoint", command, str(run_dir))
        assert (answer.code, answer.error) == (0, "")
        assert any(str(checkpoint) in line for line in answer.out.splitlines()), answer.out
    assert str(checkpoint) in trainshort("checkpoint", "reshape", str(run_dir), "--dry-run").out
    (listed,) = json.loads(trainshort("checkpoint", "list", str(run_dir), "--json").out)
    assert listed["path"] == str(checkpoint)
    for name in ("[/]", f"{run_dir}/none"):
        assert f"checkpoint {name} does not exist" in refused(trainshort, "generate", name, "--prompt", "x")


def test_line_breaks_in_names_do_not_break_messages(trainshort: Call, folder: Path) -> None:
    name = "a\nerror: b\x1b[31m\r\udcff"
    shown = "a\\nerror: b\\x1b[31m\\r\\udcff"
    assert f"checkpoint {shown} does not exist" in refused(trainshort, "checkpoint", "verify", name)
    assert refused(trainshort, "check", "demo", name).startswith("got unexpected extra argument(s) (a\\x0aerror: b")
    shutil.copytree(OLD_RUN, folder / name)
    listed = trainshort("checkpoint", "list", name)
    assert f"{shown}/checkpoints/step_0000002" in listed.out
    (document,) = json.loads(trainshort("checkpoint", "list", name, "--json").out)
    assert document["path"] == f"{name}/checkpoints/step_0000002"
    problems = trainshort("check", "demo", "--set", "model.heads=5", "--set", "train.micro_batch=3").error
    assert len(problems.splitlines()) > 2, "the problems of a run file have a line each"


def test_warnings_show_control_characters(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here("checkpoint", "list", str(run_dir))
    capsys.readouterr()
    logging.getLogger("tests").warning("%s cannot\nbe read", "a\x1b[2J[red]:smile:")
    assert capsys.readouterr().err == "a\\x1b[2J[red]:smile: cannot\nbe read\n"


@dataclass(frozen=True)
class StoredModel:
    """A model that continues any prompt with a text that is hard to show."""

    def stream(self, prompt: str, **_: object) -> "StoredStream":
        return StoredStream(prompt)


class StoredStream(Iterator[str]):
    def __init__(self, prompt: str) -> None:
        text = f"{prompt}{TEXT}€\x00日本 \u2028"
        self.pieces = iter(text)
        self.result = GeneratedText(prompt, text, 3, 2, (5, 6), True, 0.1, None, 16, 0.8, 0.95, 7)

    def __next__(self) -> str:
        return next(self.pieces)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Let `generate run --prompt x` write its prompt and a text that is hard to show; return both."""
    shutil.copytree(OLD_RUN, folder / "run")
    monkeypatch.setattr("training.api.load", lambda _, **options: StoredModel())
    return f"x{TEXT}€\x00日本 \u2028"


def test_generated_text_is_written_byte_for_byte(
    trainshort: Call, generated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    answer = trainshort("generate", "run", "--prompt", "x")
    assert answer.out == f"{generated}\n"
    assert answer.error == "3 + 2 tokens (0.312 x trained): 0.10 s; ended; --seed 7\n"
    document = json.loads(trainshort("generate", "run", "--prompt", "x", "--json").out)
    assert (document["prompt"], document["text"], document["seed"]) == ("x", generated, 7)
    assert trainshort("generate", "run", "--prompt", "x", "--quiet") == Answer(0, f"{generated}\n", "")


def test_every_command_writes_to_any_encoding(generated: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "latin-1"):
        for arguments in (
            ("generate", "run", "--prompt", "x"),
            ("generate", "run", "--prompt", "x", "--json"),
            ("checkpoint", "list", str(run_dir)),
            ("checkpoint", "list", str(run_dir), "--json"),
            ("checkpoint", "verify", str(run_dir)),
            ("check", "demo"),
            ("slurm", "demo", "--set", "run.dir=€"),
            ("--help",),
        ):
            streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", streams[0])
                patch.setattr(sys, "stderr", streams[1])
                assert run_here(*arguments) == 0, arguments
                streams[0].flush()
            out = streams[0].buffer.getvalue()  # type: ignore[attr-defined]
            if arguments[0] == "generate" and "--json" not in arguments:
                assert out == f"{generated}\n".encode(), "the text is UTF-8, as training's text is"
            elif "--json" in arguments:
                json.loads(out.decode("ascii"))
            elif arguments[0] == "checkpoint":
                assert b"\\u20ac" in out


def written_to(stream: object, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        code = run_here(*arguments)
        sys.stdout.close()
    return code


def test_a_closed_pipe_ends_output_quietly(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run_dir / "checkpoints" / "step_0000003"
    broken.mkdir()
    for arguments, code in ((("list",), 0), (("list", "--json"), 0), (("verify",), 2), (("reshape", "--dry-run"), 0)):
        reader, writer = os.pipe()
        os.close(reader)
        # The exit code is that of the work: one checkpoint is broken.
        assert written_to(os.fdopen(writer, "w"), "checkpoint", *arguments, str(run_dir)) == code
        warnings = capsys.readouterr().err.splitlines()
        assert all(line.endswith(" is used instead") for line in warnings), warnings
    assert written_to(None, "checkpoint", "list", str(run_dir)) == 0  # closed by the shell: >&-
    for arguments in (("--help",), ("train", "--help"), ("jobs", "--help")):
        reader, writer = os.pipe()
        os.close(reader)
        assert written_to(os.fdopen(writer, "w"), *arguments) == 0, arguments
    assert not capsys.readouterr().err


def test_a_full_disk_under_the_output_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("checkpoint", "list", str(run_dir)), ("--help",), ("train", "--help"), ("jobs",)):
        assert written_to(open("/dev/full", "w"), *arguments) == 3, arguments
        assert capsys.readouterr().err == (
            "error: standard output cannot be written (No space left on device): free space, or write it elsewhere\n"
        )


def test_prepare_shows_names_of_files_as_they_are(trainshort: Call, folder: Path) -> None:
    source = "a[/red]:smile:.txt"
    (folder / "a[").mkdir()
    (folder / source).write_text(BOOK, encoding="utf-8")
    values = small_run(ONE_RANK, {"data": {"sources": [source]}})
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    answer = trainshort("prepare", "run.yaml")
    assert answer.code == 0, answer.error
    assert f"  {source}  " in answer.out
    assert source in answer.error, "the progress bar names it too"


def test_scripts_are_printed_as_they_are_submitted(trainshort: Call, folder: Path) -> None:
    values = small_run({"slurm": {"setup": ["export A='[red]:smile:\tx  '"]}})
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    answer = trainshort("slurm", "run.yaml")
    assert answer.code == 0, answer.error
    assert "export A='[red]:smile:\tx  '\n" in answer.out


def test_a_librarys_error_is_shown_in_one_line() -> None:
    assert first_line(OSError(2, "no network\nand more")) == "[Errno 2] no network"
    assert first_line(KeyError("no 'model_type'\nand more")) == "no 'model_type'"
    assert first_line(ValueError()) == "ValueError"
