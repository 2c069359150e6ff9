"""A command line that cannot be read is one line; one that asks for nothing shows help."""

import pytest

from tests.support.command_line import Call, refused

USAGE = {
    ("chekc", "demo"): "no such command 'chekc'",
    ("check",): "missing argument 'RUN.yaml': see `trainshort check --help`",
    ("check", "demo", "--sett", "a.b=1"): "no such option: --sett",
    ("check", "demo", "other"): "got unexpected extra argument(s) (other): see `trainshort check --help`",
    ("train", "demo", "--ranks"): "option '--ranks' requires an argument: see `trainshort --help`",
    ("train", "demo", "--ranks", "two"): "--ranks must be a whole number from 1, got 'two': write --ranks 4",
    ("train", "demo", "--ranks", "0"): "--ranks must be a whole number from 1, got '0': write --ranks 4",
    ("train", "demo", "--ranks", "-1"): "--ranks must be a whole number from 1, got '-1': write --ranks 4",
    ("slurm", "demo", "--nodes", "1.5"): "--nodes must be a whole number from 1, got '1.5': write --nodes 4",
    ("export", "run", "--out", "new"): "missing option '--format': see `trainshort export --help`",
    ("checkpoint", "lst", "run"): "no such command 'lst'",
}


@pytest.mark.parametrize("arguments", USAGE)
@pytest.mark.usefixtures("folder")
def test_a_wrong_command_line_is_one_line(trainshort: Call, arguments: tuple[str, ...]) -> None:
    message = refused(trainshort, *arguments)
    assert message.startswith(USAGE[arguments])
    assert ": see `trainshort" in message or ": write --" in message


@pytest.mark.parametrize("arguments", [(), ("checkpoint",)])
def test_a_command_that_needs_another_shows_its_help(trainshort: Call, arguments: tuple[str, ...]) -> None:
    answer = trainshort(*arguments)
    assert (answer.code, answer.error) == (2, "")
    assert "Commands" in answer.out
    asked = trainshort(*arguments, "--help")
    assert (asked.code, asked.error, asked.out.strip()) == (0, "", answer.out.strip())
