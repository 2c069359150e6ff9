"""A wrong command line is refused in one line; a command without arguments shows its help."""

import pytest

from tests.support.command_line import Call, refused

USAGE = {
    ("chekc", "demo"): "no such command 'chekc'",
    ("check",): "missing argument 'RUN.yaml': see `trainshort check --help`",
    ("check", "demo", "--sett", "a.b=1"): "no such option: --sett",
    ("check", "demo", "other"): "got unexpected extra argument(s) (other): see `trainshort check --help`",
    ("train", "demo", "--ranks"): "option '--ranks' requires an argument: see `trainshort --help`",
    ("export", "run", "--out", "new"): "missing option '--format': see `trainshort export --help`",
    ("checkpoint", "lst", "run"): "no such command 'lst'",
}


@pytest.mark.parametrize("arguments", USAGE)
@pytest.mark.usefixtures("folder")
def test_a_wrong_command_line_is_one_line(trainshort: Call, arguments: tuple[str, ...]) -> None:
    message = refused(trainshort, *arguments)
    assert message.startswith(USAGE[arguments])
    assert ": see `trainshort" in message


@pytest.mark.usefixtures("folder")
def test_a_number_option_takes_whole_numbers_from_1(trainshort: Call) -> None:
    for command, option, value in (
        (("train", "demo"), "--ranks", "two"),
        (("train", "demo"), "--ranks", "0"),
        (("train", "demo"), "--ranks", "-1"),
        (("slurm", "demo"), "--nodes", "1.5"),
        (("generate", "run"), "--tokens", "1_000"),
        (("checkpoint", "reshape", "run"), "--ranks", "1234567890"),
    ):
        assert refused(trainshort, *command, option, value) == (
            f"{option} must be a whole number from 1, got {value!r}: write {option} 4"
        )


@pytest.mark.usefixtures("folder")
def test_lengths_are_whole_numbers_from_2(trainshort: Call) -> None:
    for value in ("", "12,", "1", "1k", "64;128", "-5", "1.5"):
        assert refused(trainshort, "evaluate", "run", f"--lengths={value}") == (
            f"--lengths must be whole numbers from 2 with commas between, got {value!r}: write 1024,2048"
        )


@pytest.mark.parametrize("arguments", [(), ("checkpoint",)])
def test_a_command_group_alone_shows_its_help(trainshort: Call, arguments: tuple[str, ...]) -> None:
    answer = trainshort(*arguments)
    assert (answer.code, answer.error) == (2, "")
    assert "Commands" in answer.out
    asked = trainshort(*arguments, "--help")
    assert (asked.code, asked.error, asked.out.strip()) == (0, "", answer.out.strip())
