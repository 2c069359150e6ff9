"""A wrong command line is refused in one line; a command without arguments shows its help; options of every command."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import build_command
from tests.support.command_line import Call, refused

USAGE = {
    ("chekc", "demo"): "no such command 'chekc' (did you mean check?): see `trainshort --help`",
    ("eval", "run"): "no such command 'eval' (did you mean evaluate?)",
    ("xyzzy",): "no such command 'xyzzy': see `trainshort --help`",
    ("check",): "missing argument 'RUN.yaml': see `trainshort check --help`",
    ("check", "demo", "--sett", "a.b=1"): "no such option: --sett (did you mean --set?): see `trainshort check --help`",
    ("train", "demo", "--rank", "2"): "no such option: --rank (did you mean --ranks?): see `trainshort train --help`",
    ("--versio",): "no such option: --versio (did you mean --version?): see `trainshort --help`",
    ("check", "demo", "--xyzzy"): "no such option: --xyzzy: see `trainshort check --help`",
    ("runs", "--jsn"): "no such option: --jsn (did you mean --json?): see `trainshort runs list --help`",
    ("check", "demo", "other"): "got unexpected extra argument(s) (other): see `trainshort check --help`",
    ("train", "demo", "--ranks"): "option '--ranks' requires an argument: see `trainshort --help`",
    ("export", "run", "--out", "new"): "missing option '--format': see `trainshort export --help`",
    ("checkpoint", "lst", "run"): "no such command 'lst' (did you mean list?): see `trainshort checkpoint --help`",
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
            f"{option} must be a whole number from 1 to 999999999, got {value!r}: write {option} 4"
        )


@pytest.mark.usefixtures("folder")
def test_lengths_are_whole_numbers_from_2(trainshort: Call) -> None:
    for value in ("", "12,", "1", "1k", "64;128", "-5", "1.5"):
        assert refused(trainshort, "evaluate", "run", f"--lengths={value}") == (
            f"--lengths must be whole numbers from 2 to 999999999 separated by commas, got {value!r}: write 1024,2048"
        )


@pytest.mark.parametrize("arguments", [(), ("checkpoint",)])
def test_a_command_group_alone_shows_its_help(trainshort: Call, arguments: tuple[str, ...]) -> None:
    answer = trainshort(*arguments)
    assert (answer.code, answer.error) == (2, "")
    assert "Commands" in answer.out
    asked = trainshort(*arguments, "--help")
    assert (asked.code, asked.error, asked.out.strip()) == (0, "", answer.out.strip())


def every_command(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command with the words that call it, groups too."""
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, *names, name)


def test_every_command_takes_the_common_options(trainshort: Call) -> None:
    for names, command in every_command(build_command()):
        options = {name for parameter in command.params for name in parameter.opts}
        assert {"--quiet", "-q", "--verbose", "-v"} <= options, names
        assert trainshort(*names, "-h").code == 0


@pytest.mark.parametrize(
    ("option", "level"), [(None, logging.INFO), ("--quiet", logging.WARNING), ("-v", logging.DEBUG)]
)
def test_the_level_is_set_before_or_after_the_command(
    trainshort: Call, folder: Path, option: str | None, level: int
) -> None:
    option_words = [option] if option else []
    for words in ([*option_words, "check", "run.yaml"], ["check", "run.yaml", *option_words]):
        answer = trainshort(*words)
        assert logging.getLogger().level == level
        assert answer.out.startswith("small is valid")  # a result is shown under --quiet too
    trainshort(*option_words, "runs", "list", *option_words, ".")
    assert logging.getLogger().level == level


@pytest.mark.usefixtures("folder")
def test_quiet_and_verbose_together_are_refused(trainshort: Call) -> None:
    for words in (("-q", "-v", "check", "demo"), ("-v", "check", "demo", "--quiet"), ("check", "demo", "-qv")):
        assert refused(trainshort, *words) == "--quiet and --verbose contradict each other: leave one of them out"
    # an error of the user is one line, however much else is said
    assert refused(trainshort, "-v", "check", "nope").startswith("run file nope does not exist")


def test_the_versions_are_one_line(trainshort: Call) -> None:
    answer = trainshort("--version")
    assert (answer.code, answer.error, answer.out.count("\n")) == (0, "", 1)
    assert answer.out.startswith("trainshort ")
    for package in ("torch", "deepspeed", "megatron-core", "mlflow"):
        assert f"{package} " in answer.out


def test_no_escape_code_is_written_where_none_is_wanted(trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in trainshort("check", "--help").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in trainshort("check", "--help").out
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    for words in (("--help",), ("checkpoint",), ("check", "demo"), ("chekc",)):
        answer = trainshort(*words)
        assert "\x1b" not in answer.out + answer.error
