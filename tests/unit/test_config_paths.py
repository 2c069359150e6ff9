"""`~` and environment variables are replaced in every key and argument that holds a path."""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.load import check_run, dump_run, load_run
from configs.path_text import expand_path
from configs.paths import check_run_folder, data_folder, incarnation_file, run_folder
from tests.support.command_line import Call, write_run

PATHS = {
    "run": {"dir": "~/run"},
    "data": {"sources": ["~/*.txt", "${CORPUS}/a.jsonl"], "dir": "$SCRATCH/data", "tokenizer": "~/t.model"},
    "train": {"init_from": "$SCRATCH/$USER_RUN"},
    "slurm": {"container": "~/image.sqsh", "mounts": ["$SCRATCH:/data", "~/x:/x"]},
}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "CORPUS": "texts", "USER_RUN": "run7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")


def run_with(values: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return values | {section: values.get(section, {}) | keys for section, keys in changes.items()}


def test_every_path_key_is_expanded(run_values: dict[str, Any], tmp_path: Path) -> None:
    config = check_run(run_with(run_values, PATHS), name="small")
    assert run_folder(config) == Path("/home/me/run")
    assert data_folder(config) == Path("/scratch/data")
    assert [source.path for source in config.data.sources] == ["/home/me/*.txt", "texts/a.jsonl"]
    assert config.data.tokenizer == "/home/me/t.model"
    assert config.train.init_from == "/scratch/run7"
    assert config.slurm.container == "/home/me/image.sqsh"
    assert config.slurm.mounts == ("/scratch:/data", "/home/me/x:/x")
    (tmp_path / "again.yaml").write_text(dump_run(config), encoding="utf-8")
    assert load_run(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize(
    ("uri", "expanded"),
    [
        ("sqlite:///~/m.db", "sqlite:////home/me/m.db"),
        ("sqlite:///$SCRATCH/m.db", "sqlite:////scratch/m.db"),
        ("sqlite:///runs/$USER_RUN.db", "sqlite:///runs/run7.db"),
        ("file://$SCRATCH/m", "file:///scratch/m"),
        ("file:///~/m", "file:///home/me/m"),
        ("~/mlruns", "/home/me/mlruns"),
        # it may be a password, which must not be written out
        ("http://me:$SCRATCH@host:5000", "http://me:$SCRATCH@host:5000"),
        ("postgresql://me:$NOT_SET@host/db", "postgresql://me:$NOT_SET@host/db"),
        ("databricks", "databricks"),
    ],
)
def test_stores_that_are_files_are_expanded(run_values: dict[str, Any], uri: str, expanded: str) -> None:
    assert check_run(run_with(run_values, {"track": {"uri": uri}}), name="small").track.uri == expanded


def test_every_variable_that_is_not_set_is_named(run_values: dict[str, Any]) -> None:
    changes = {
        "run": {"dir": "$NOT_SET/run"},
        "data": {"sources": ["a.txt", "${NOT_SET}"], "dir": "$EMPTY/data"},
        "track": {"uri": "sqlite:///$NOT_SET"},
    }
    with pytest.raises(InputError) as caught:
        check_run(run_with(run_values, changes), name="small")
    assert str(caught.value).splitlines() == [
        "small has 4 problems:",
        "  run.dir is '$NOT_SET/run', but the variable $NOT_SET is not set: set it, or write the path out",
        "  data.sources.1.path is '${NOT_SET}', but the variable ${NOT_SET} is not set: set it, or write the path out",
        "  data.dir is '$EMPTY/data', but the variable $EMPTY is not set: set it, or write the path out",
        "  track.uri is 'sqlite:///$NOT_SET', but the variable $NOT_SET is not set: set it, or write the path out",
    ]


def test_arguments_are_expanded_too(trainshort: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WORK", str(folder))
    write_run(folder)
    for run in ("~/run.yaml", "$WORK/run.yaml", "${WORK}/run.yaml"):
        assert trainshort("check", run).code == 0
    for arguments in (
        ("checkpoint", "list", "$WORK/no"),
        ("checkpoint", "verify", "$WORK/no"),
        ("jobs", "status", "~/no"),
    ):
        answer = trainshort(*arguments)
        assert answer.code == 2
        assert f"{folder}/no" in answer.error
    # refused while the command line is read, so nothing slow is loaded
    for arguments in (
        ("evaluate", "$NOT_SET/no"),
        ("evaluate", "run", "--data", "$NOT_SET/no"),
        ("generate", "run", "--prompt-file", "$NOT_SET/no"),
        ("export", "run", "--format", "hf", "--out", "$NOT_SET/no"),
    ):
        answer = trainshort(*arguments)
        assert answer.code == 2
        assert (
            answer.error == "error: path $NOT_SET/no: the variable $NOT_SET is not set: set it, or write the path out\n"
        )


def test_a_name_with_a_dollar_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "$NOT_SET").mkdir()
    assert expand_path(f"{tmp_path}/$NOT_SET") == tmp_path / "$NOT_SET"


def test_a_path_that_no_run_file_can_hold_is_refused(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "caf\udce9.txt")
    with pytest.raises(
        InputError, match=r"data\.sources\.0\.path is '\$ODD', but its name is not UTF-8, which no run file can hold"
    ):
        check_run(run_with(run_values, {"data": {"sources": ["$ODD"]}}), name="small")
    (tmp_path / "w\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "w\udce9")
    config = check_run(run_with(run_values, {"run": {"dir": "run"}}), name="small")
    with pytest.raises(InputError, match=r"run\.dir .* has a name that is not UTF-8: rename the folder"):
        check_run_folder(config)


def test_a_folder_that_holds_other_things_is_no_run_folder(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for text in ("/", "..", "run/../..", "~"):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with pytest.raises(InputError, match=r"run\.dir must be a folder for this run alone, got .*: set one such"):
            check_run_folder(check_run(run_with(run_values, {"run": {"dir": text}}), name="small"))
    for text in ("run", ".", "../other", "~/run"):
        check_run_folder(check_run(run_with(run_values, {"run": {"dir": text}}), name="small"))
    (tmp_path / "work" / "run" / "checkpoints" / "step_0000004").mkdir(parents=True)
    for text in ("run/checkpoints", "run/checkpoints/step_0000004", "run/checkpoints/step_0000004/inner"):
        with pytest.raises(InputError, match=rf"run\.dir {text} is in .*: choose another run\.dir"):
            check_run_folder(check_run(run_with(run_values, {"run": {"dir": text}}), name="small"))
    monkeypatch.chdir("run")
    config = check_run(run_with(run_values, {"run": {"dir": ".."}}), name="small")
    incarnation_file(Path("..")).touch()  # a run that was started before goes on
    assert check_run_folder(config) == Path("..")


def test_an_address_keeps_its_dollar(run_values: dict[str, Any]) -> None:
    image = "docker://$oauthtoken@nvcr.io#nvidia/pytorch:24"
    assert check_run(run_with(run_values, {"slurm": {"container": image}}), name="small").slurm.container == image
