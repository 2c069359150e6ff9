"""`generate` on a checkpoint that an older version wrote: streams, seeds, and the prompt that stays open."""

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.show.generation import show_speed
from tests.support.command_line import Call, run_here
from training.api import TrainedModel, load
from training.generation import GeneratedText, TextStream

OLD_RUN = str(Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0")
SPEED = re.compile(r"\d+ \+ \d+ tokens \([\d.]+ x trained\): [\d.]+ s.*")


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load(OLD_RUN)


class Typed(io.TextIOWrapper):
    """Standard input with some lines in it, as a pipe or as a terminal."""

    def __init__(self, raw: bytes, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(raw))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_the_printed_seed_repeats_the_text(trainshort: Call) -> None:
    first = trainshort("generate", OLD_RUN, "--prompt", "Once", "--tokens", "30")
    (line,) = first.error.splitlines()
    assert SPEED.fullmatch(line)
    *_, seed = line.split()
    again = trainshort("generate", OLD_RUN, "--prompt", "Once", "--tokens", "30", "--seed", seed, "--json")
    document = json.loads(again.out)
    assert f"{document['text']}\n" == first.out
    assert (document["seed"], document["temperature"], document["top_p"]) == (int(seed), 0.8, 0.95)
    assert again.error.endswith(f"--seed {seed}\n")
    texts = {trainshort("generate", OLD_RUN, "--prompt", "Once").out for _ in range(3)}
    assert len(texts) == 3


def test_long_texts_have_a_line_of_80_columns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        show_speed(GeneratedText("", "", 4096, 1024, (), True, 12.34, 1 / 2345, 1024, 0.8, 0.95, 999_999))
    (line,) = caplog.messages
    assert line == "4096 + 1024 tokens (5 x trained): 12.34 s, then 2,345/s; ended; --seed 999999"
    assert len(line) <= 80


def test_greedy_is_temperature_zero(trainshort: Call, model: TrainedModel) -> None:
    answers = [
        trainshort("generate", OLD_RUN, "--prompt", "Once", "--tokens", "9", *options)
        for options in (("--greedy",), ("--temperature", "0"), ("--temperature", "0", "--seed", "5"))
    ]
    assert {answer.out for answer in answers} == {f"{model.generate('Once', tokens=9, temperature=0)}\n"}
    assert "--seed" not in answers[0].error


def test_text_is_written_as_it_is_generated(monkeypatch: pytest.MonkeyPatch, model: TrainedModel) -> None:
    arguments = ("generate", OLD_RUN, "--prompt", "Onceé日", "--tokens", "80", "--temperature", "9", "--seed", "2")
    written: list[bytes] = []

    class Reader(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            written.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Reader()), encoding="ascii"))
    assert run_here(*arguments) == 0
    text = model.generate("Onceé日", tokens=80, temperature=9, seed=2)
    assert b"".join(written).decode() == f"{text}\n"
    assert written[0].decode() == "Onceé日"
    assert len(written) > text.tokens / 2
    for part in written:
        part.decode("utf-8")  # whole characters


def test_generation_ends_when_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    # greedily it never ends by itself
    assert run_here("generate", OLD_RUN, "--prompt", "Once", "--tokens", "100000000", "--greedy") == 0
    sys.stdout.close()


def interact(monkeypatch: pytest.MonkeyPatch, raw: bytes, *options: str, terminal: bool = False) -> int:
    """Run `generate --interactive` with this standard input; return its exit code."""
    monkeypatch.setattr(sys, "stdin", Typed(raw, terminal=terminal))
    return run_here("generate", OLD_RUN, "--interactive", "--tokens", "6", *options)


def test_each_line_of_a_pipe_is_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: TrainedModel
) -> None:
    assert interact(monkeypatch, "\ufeffOnce\n\na\rb é\r\nOnce".encode(), "--seed", "7") == 0
    out, error = capsys.readouterr()
    prompts = ("Once", "", "a\rb é", "Once")
    texts = [model.generate(prompt, tokens=6, seed=7 + number) for number, prompt in enumerate(prompts)]
    assert out == "".join(f"{each.text.removeprefix(each.prompt)}\n" for each in texts)
    how, *speeds = error.splitlines()
    assert "a line is a prompt" in how
    assert [line.split()[-1] for line in speeds] == ["7", "8", "9", "10"]
    assert all(SPEED.fullmatch(line) for line in speeds)
    assert interact(monkeypatch, b"Once\n", "--greedy", "--quiet") == 0
    out, error = capsys.readouterr()
    assert (out, error) == (f"{model.generate('Once', tokens=6, temperature=0).text.removeprefix('Once')}\n", "")
    assert interact(monkeypatch, b"") == 0


def test_a_line_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert interact(monkeypatch, b"ab\xff\n", "--quiet") == 2
    assert capsys.readouterr() == ("", "error: the prompt is not UTF-8 at character 2: write it in UTF-8\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert run_here("generate", OLD_RUN, "--interactive") == 2
    assert capsys.readouterr().err.startswith("error: --interactive reads standard input, which is closed: ")


@contextlib.contextmanager
def interrupted_after(pieces: int) -> Iterator[None]:
    """Let Ctrl-C arrive in the first stream, after some pieces."""
    taken = 0
    proceed = TextStream.__next__

    def next_piece(stream: TextStream) -> str:
        nonlocal taken
        taken += 1
        if taken == pieces + 1:
            raise KeyboardInterrupt
        return proceed(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStream, "__next__", next_piece)
        yield


def test_ctrl_c_stops_a_text_and_keeps_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with interrupted_after(3):
        assert interact(monkeypatch, b"Once\ntwice\n", "--greedy", terminal=True) == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) >= 2
    assert [line.split(" tokens")[0].split(" + ")[1] for line in error.splitlines() if " + " in line] == ["2", "6"]
    assert error.count("> ") == 3, "standard output is no terminal: the prompts are on standard error"
    with interrupted_after(3):  # a pipe has no prompt to come back to
        assert interact(monkeypatch, b"Once\ntwice\n", "--greedy") == 130
    assert "2 tokens" in capsys.readouterr().err


def test_ctrl_c_ends_a_text_with_130(trainshort: Call) -> None:
    with interrupted_after(3):
        answer = trainshort("generate", OLD_RUN, "--prompt", "Once", "--seed", "1")
    assert answer.code == 130
    assert answer.out.startswith("Once")
    assert answer.out.endswith("\n")
    assert "--seed 1" in answer.error
