"""Read a run file: strict YAML, overrides, files that cannot be read."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.load import RUNS, check_run, dump_run, load_run, read_yaml
from configs.strict_yaml import dump_yaml, plain_yaml


def write(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def message_of(run: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_run(run, overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_numbers_strings_and_null_are_read_as_they_look() -> None:
    text = "{a: 1e-3, b: 12:30:00, c: on, d: true, e: ~, f: 1_000, g: 0x10, h: 010, i: 2024-01-01, j: .5, k: -2.5e+3}"
    assert read_yaml(text, name="here") == {
        "a": 0.001,
        "b": "12:30:00",
        "c": "on",
        "d": True,
        "e": None,
        "f": 1000,
        "g": "0x10",
        "h": "010",
        "i": "2024-01-01",
        "j": 0.5,
        "k": -2500.0,
    }


@pytest.fixture(scope="module")
def smallest_floats() -> Iterator[None]:
    """Keep floats below 1e-308: an earlier test in this process may have made the CPU round them to zero."""
    torch, rounded = sys.modules.get("torch"), float("5e-324") * 1.0 == 0.0
    if torch is not None and rounded:
        torch.set_flush_denormal(False)
    yield
    if torch is not None and rounded:
        torch.set_flush_denormal(True)


@pytest.mark.usefixtures("smallest_floats")
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(number: float) -> None:
    assert read_yaml(repr(number), name="here") == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a, name: b}", "here, line 1: key 'name' appears twice: remove one"),
        ("a: 1\nb: 2\na: 3", "here, line 3: key 'a' appears twice: remove one"),
        ("a: [1, 2", "here, line 1: it ends before a closing ]: add it"),
        (
            "a: !!python/object/apply:os.system [true]",
            "here, line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: \x07", "here is not YAML: "),
        ("? [a]\n: b", "here, line 1: "),
        ("? {a: 1}\n: b", "here, line 1: "),
        ("a: &x 1\nb: *y", "here, line 2: the alias *y is not defined: quote a value that begins with *"),
    ],
)
def test_yaml_that_is_not_strict_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(text, name="here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path, run_values: dict[str, Any]) -> None:
    assert load_run(write(tmp_path / "mine.yaml", run_values)).run.name == "small"
    assert load_run("demo").run.name == "demo"


@pytest.mark.parametrize("text", ["1.10", "0.50", "1e3", "12_000", "+5", "7", "1.5"])
def test_a_number_where_text_is_wanted_stays_as_written(text: str) -> None:
    keys = (f"track.tags={{version: {text}}}", f"slurm.env={{VERSION: {text}}}", f"train.learning_rate={text}")
    run = load_run("demo", overrides=list(keys))
    assert (run.track.tags, run.slurm.env) == ({"version": text}, {"VERSION": text})
    assert type(run.train.learning_rate) is float
    assert run.train.learning_rate == float(text)


@given(st.text() | st.from_regex(r"[-+]?[0-9_.]{0,3}[eE]?[-+]?[0-9]{0,2}", fullmatch=True))
def test_every_text_is_read_back(text: str) -> None:
    written = dump_yaml({text: [text]})
    assert read_yaml(written, name="here") == yaml.safe_load(written) == {text: [text]}
    assert read_yaml(plain_yaml(text), name="here") == text


def test_dumped_runs_load_to_equal_values(tmp_path: Path) -> None:
    for file in RUNS.glob("*.yaml"):
        config = load_run(file.stem)
        assert config.run.name == file.stem
        assert load_run(write(tmp_path / "again.yaml", dump_run(config))) == config, file.stem


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert message_of("no/such.yaml") == (
        "run file no/such.yaml does not exist: give a YAML file or one of alibi-125m, alibi-1b3, "
        "alibi-1b3-80gb, bloom-176b, demo, sinusoidal-1b3, sinusoidal-1b3-80gb, wikitext103"
    )
    assert message_of("demmo").startswith("run file demmo does not exist: give a YAML file or one of ")
    assert message_of(str(tmp_path)).startswith(f"run file {tmp_path} is a folder: give a YAML file")
    assert message_of("/dev/null").startswith("run file /dev/null is a device or a pipe: give a YAML file or one of ")
    assert message_of("").startswith("run file '' is not a name: give a YAML file or one of alibi-125m, ")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run: {name: caf\xe9}")
    assert message_of(str(latin)) == f"run file {latin} is not UTF-8 at byte 15: save it as UTF-8"


def test_a_file_without_sections_is_refused(tmp_path: Path) -> None:
    for text, problem in (
        ("", "is empty"),
        ("# model:\n", "holds no keys"),
        ("- a\n- b", "must hold sections of keys, got a list"),
        ("word", "must hold sections of keys, got text"),
        ("7", "must hold sections of keys, got a value"),
    ):
        run = write(tmp_path / "odd.yaml", text)
        assert message_of(run) == f"run file {run} {problem}: type `trainshort init NAME` for one to edit"


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load_run(
        "demo",
        overrides=[
            "train.steps=20",
            "train.steps=30",
            "train.learning_rate=1e-2",
            "data.sources=[{path: a.txt, weight: 1.0}, {path: b, weight: 2.0}]",
            "evaluate.lengths=[64, 128]",
            "track.uri=http://host:5000/?a=b",
            "slurm.env.NCCL_DEBUG=INFO",
            "data.document_separator='<|end|>'",
            "run.name=other",
        ],
    )
    assert config.train.steps == 30
    assert config.train.learning_rate == 0.01
    assert [(source.path, source.weight) for source in config.data.sources] == [("a.txt", 1.0), ("b", 2.0)]
    assert config.evaluate.lengths == (64, 128)
    assert config.track.uri == "http://host:5000/?a=b"
    assert config.slurm.env == {"NCCL_DEBUG": "INFO"}
    assert config.data.document_separator == "<|end|>"
    assert config.run.name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", "--set 'steps=3' is not an override: write section.key=value"),
        ("train.steps", "--set 'train.steps' is not an override: write section.key=value"),
        ("=", "--set '=' is not an override: write section.key=value"),
        ("train.steps.more=3", "--set 'train.steps.more=3': steps has no keys of its own: write section.key=value"),
        ("train.steps=[1", "--set train.steps is not YAML: it ends before a closing ]: add it"),
        ("train.x=[", "--set train.x is not YAML: it ends where a value is expected: close every bracket"),
        ("run.name='a", "--set run.name is not YAML: it ends inside quotes: close them"),
        ("data.sources=*.txt", "--set data.sources is not YAML: a value cannot begin with *, & or %: quote it"),
        ("data.sources=[@a]", "--set data.sources is not YAML: a value cannot begin with @: quote it"),
        ("run.name=\x07", "--set run.name is not YAML: it holds the control character '\\x07': remove it"),
        ("slurm.env={a: b, a: c}", "--set slurm.env, key 'a' appears twice: remove one"),
        ("train.stepps=3", "demo: unknown key train.stepps: did you mean steps?"),
        ("trian.steps=3", "demo: unknown key trian: did you mean train?"),
        ("train.steps=", "demo: train.steps: must be a valid integer, got null"),
    ],
)
def test_overrides_that_are_wrong_are_named(override: str, message: str) -> None:
    assert message_of("demo", override) == message


def test_runs_are_frozen(run_values: dict[str, Any]) -> None:
    config = check_run(run_values, name="small")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
