"""Which MLflow store a run is logged to, how its file is created, and what happens when it moves."""

import json
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.mlflow_database import MlflowDatabase
from training.incarnation import begin_incarnation
from training.tracking.client import import_client
from training.tracking.record import RunRecord, read_record, write_record
from training.tracking.store import Store, choose_store, create_file, default_store, recorded_store, recorded_uri
from training.tracking.tracker import MlflowTracker, attach

# a warning of sqlalchemy about mlflow's queries
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def start(run_dir: Path, *, uri: str | None = None, experiment: str | None = "tests") -> MlflowTracker:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("model: {heads: 4}\n")
    tracker = MlflowTracker(run_dir, name=run_dir.name, experiment=experiment, uri=uri)
    tracker.start({"model": {"heads": 4}}, run_dir / "config.yaml")
    return tracker


def write_there(uri: str, *, text: str) -> None:
    Path(uri.removeprefix("sqlite:///")).write_text(text)


def test_a_new_file_is_created_once_and_appears_whole(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "mlflow.db"
    filled = []

    def fill(uri: str) -> None:
        filled.append(uri)
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
            connection.execute("create table first (x)")
            time.sleep(0.2)  # another start looks meanwhile
            assert not file.exists(), "it appears only once it is whole"
            connection.execute("create table second (x)")
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: create_file(file, fill=fill), range(8)))
    assert len(filled) == 1
    assert MlflowDatabase(file).rows("select name from sqlite_master order by name") == [("first",), ("second",)]
    assert {path.name for path in file.parent.iterdir()} == {"mlflow.db"}
    create_file(file, fill=fill)
    assert len(filled) == 1
    file.unlink()
    file.touch()  # an empty file is no store yet
    create_file(file, fill=partial(write_there, text="tables"))
    assert file.read_text() == "tables"


def test_a_folders_name_may_look_like_a_part_of_a_uri(tmp_path: Path) -> None:
    run_dir = tmp_path / "why?%20not" / "first"
    run_dir.mkdir(parents=True)
    store, client = default_store(run_dir), import_client()
    assert store.file == run_dir.parent / "mlflow.db"
    create_file(store.file, fill=lambda uri: client(tracking_uri=uri).search_experiments())
    client(tracking_uri=store.uri).create_experiment("first")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [store.file]
    assert ("first",) in MlflowDatabase(store.file).rows("select name from experiments")
    other = Store("sqlite:///" + str(tmp_path / "a%20b.db"), "track.uri")
    assert other.file == tmp_path / "a b.db"
    assert recorded_uri(other, run_dir=run_dir) == f"sqlite:///{tmp_path / 'a b.db'}"


def test_the_current_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / """a 'b' "c" :d \\e %27"""
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("training.tracking.client.create_file", create_file)  # no copy of another folder's
    tracker = start(Path("runs/first"))
    tracker.metrics(1, {"loss": 3.0})
    tracker.finish("FINISHED")
    database, artifacts = MlflowDatabase(here / "runs" / "mlflow.db"), here / "runs" / "mlartifacts"
    assert database.rows("select name, status from runs") == [("first", "FINISHED")]
    assert len([*artifacts.rglob("config.yaml")]) == 1
    default = database.rows("select artifact_location from experiments where name = 'Default'")
    assert default == [(f"{artifacts.as_uri()}/0",)]


def test_an_interrupted_creation_leaves_no_file(tmp_path: Path) -> None:
    def fill(uri: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(sqlite3.OperationalError):
        create_file(tmp_path / "mlflow.db", fill=fill)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_moved_runs_folder_logs_at_its_new_place(tmp_path: Path) -> None:
    old, new = tmp_path / "old runs", tmp_path / "new runs"
    first = start(old / "first")
    first.metrics(1, {"loss": 3.0})
    first.finish("KILLED")
    old.rename(new)
    again, second = start(new / "first"), start(new / "second")
    again.metrics(2, {"loss": 2.0})
    again.artifact(new / "first" / "config.yaml", folder="again")
    for tracker in (again, second):
        tracker.finish("FINISHED")
    evaluated = attach(new / "first", uri=None)
    assert evaluated is not None
    evaluated.artifact(new / "first" / "config.yaml", folder="evaluation")
    evaluated.close()

    assert not old.exists(), "nothing goes to the old place"
    database = MlflowDatabase(new / "mlflow.db")
    assert database.rows("select name, status from runs order by name") == [
        ("first", "FINISHED"),
        ("second", "FINISHED"),
    ]
    assert database.rows("select step, value from metrics order by step") == [(1, 3.0), (2, 2.0)]
    assert database.rows("select value from tags where key = 'run_dir' order by value") == [
        (str(new / "first"),),
        (str(new / "second"),),
    ]
    for run_id, location in database.rows("select run_uuid, artifact_uri from runs"):
        assert location == f"{(new / 'mlartifacts').as_uri()}/{run_id}/artifacts"
    names = [str(path.relative_to(new / "mlartifacts")) for path in (new / "mlartifacts").rglob("*.yaml")]
    assert sorted(name.partition("/artifacts/")[2] for name in names) == [
        "again/config.yaml",
        "config.yaml",
        "config.yaml",
        "evaluation/config.yaml",
    ]


@pytest.mark.parametrize("is_named", [False, True])
def test_a_copied_run_folder_gets_a_run_of_its_own(tmp_path: Path, is_named: bool) -> None:
    """The steps of both would be those of one run, and each step would be that of the folder which comes first."""
    uri = f"sqlite:///{tmp_path / 'named.db'}" if is_named else None
    folder, copy, link = (tmp_path / name for name in ("first", "copy", "link"))
    for place, step in ((folder, 1), (copy, 2), (folder, 2), (link, 3)):
        tracker = start(place, uri=uri)
        tracker.metrics(step, {"loss": step + 0.5 * (place == copy)})
        tracker.finish("FINISHED")
        if not copy.exists():
            shutil.copytree(folder, copy)
            link.symlink_to(folder)
    database = MlflowDatabase(tmp_path / ("named.db" if is_named else "mlflow.db"))
    for place, values in ((folder, [1.0, 2.0, 3.0]), (copy, [2.5])):
        record = read_record(place)
        assert record is not None
        rows = f"select value from metrics where run_uuid = '{record.run_id}' order by step"
        assert database.rows(rows) == [(value,) for value in values]
    shutil.copytree(tmp_path, tmp_path / "all", ignore=shutil.ignore_patterns("all"))
    if not is_named:  # with its own copy of the store it goes on there
        before = read_record(copy)
        start(tmp_path / "all" / "copy").finish("FINISHED")
        assert read_record(tmp_path / "all" / "copy") == before


def test_two_starts_may_create_one_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server, another start creates the experiment after this one has looked for it."""
    start(tmp_path / "runs" / "first").finish("FINISHED")
    client = import_client()
    looked, find = [], client.get_experiment_by_name

    def not_at_first(self: object, name: str) -> object:
        looked.append(name)
        return None if len(looked) == 1 else find(self, name)

    monkeypatch.setattr(client, "get_experiment_by_name", not_at_first)
    start(tmp_path / "runs" / "second").finish("FINISHED")
    database = MlflowDatabase(tmp_path / "runs" / "mlflow.db")
    assert database.rows("select name, status, experiment_id from runs order by name") == [
        ("first", "FINISHED", 1),
        ("second", "FINISHED", 1),
    ]
    assert looked == ["tests", "tests"]


def test_the_environment_names_the_store_of_a_run_file_without(tmp_path: Path) -> None:
    run_dir, variables = tmp_path / "runs" / "a", {"MLFLOW_TRACKING_URI": "https://me:pw@host:5000"}
    assert choose_store(None, run_dir=run_dir, environ={}) == default_store(run_dir)
    assert choose_store(None, run_dir=run_dir, environ={"MLFLOW_TRACKING_URI": " "}) == default_store(run_dir)
    chosen = choose_store(None, run_dir=run_dir, environ=variables)
    assert (chosen.uri, chosen.setting) == ("https://me:pw@host:5000", "MLFLOW_TRACKING_URI")
    in_home = choose_store(None, run_dir=run_dir, environ={"MLFLOW_TRACKING_URI": "sqlite:///~/m.db"})
    assert in_home.file == Path("~/m.db").expanduser()
    assert choose_store("http://other", run_dir=run_dir, environ=variables).uri == "http://other"
    # a copy of the run file has no password
    assert choose_store("https://host:5000", run_dir=run_dir, environ=variables) == chosen
    assert choose_store("https://me:own@host:5000", run_dir=run_dir, environ=variables).setting == "track.uri"
    reference = Store("https://me:${PW}@host", "track.uri")
    assert reference.with_passwords({"PW": "a/b"}) == "https://me:a%2Fb@host"
    assert reference.public_uri == "https://me:${PW}@host"
    assert reference.secrets({"PW": "a/b"}) == {"a%2Fb", "a/b"}


def test_later_commands_find_the_recorded_store(tmp_path: Path) -> None:
    run_dir, server = tmp_path / "runs" / "a", RunRecord("1", "https://host")
    variables = {"MLFLOW_TRACKING_URI": "https://me:pw@host"}
    default = recorded_store(RunRecord("1", None), uri="https://other", run_dir=run_dir, environ=variables)
    assert default == default_store(run_dir)
    assert recorded_uri(Store(f"sqlite:///{tmp_path}/runs/mlflow.db", "track.uri"), run_dir=run_dir) is None
    # trained with the variable, evaluated without it, and the other way round
    assert recorded_store(server, uri=None, run_dir=run_dir, environ={}).uri == "https://host"
    for uri in (None, "https://host", "https://another"):
        assert recorded_store(server, uri=uri, run_dir=run_dir, environ=variables).uri == "https://me:pw@host"
    moved = RunRecord("1", f"sqlite:///{tmp_path}/gone/x.db")
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/here/x.db"}
    found = recorded_store(moved, uri=moved.uri, run_dir=run_dir, environ=variables)
    assert found.file == tmp_path / "here" / "x.db"


def test_a_run_says_where_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = Path("runs/a")
    plain = MlflowTracker(run_dir, name="a", experiment=None, uri=None)
    assert plain.summary == f"MLflow: sqlite:///{tmp_path}/runs/mlflow.db, experiment trainshort"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    tracker = start(run_dir, experiment=None)
    assert tracker.summary == f"MLflow: sqlite:///{tmp_path}/team.db (from MLFLOW_TRACKING_URI), experiment ours"
    tracker.finish("FINISHED")
    assert MlflowDatabase(tmp_path / "team.db").rows("select name from experiments where experiment_id = 1") == [
        ("ours",)
    ]
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    # a later command, started elsewhere and without the variables
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    attached = attach(tmp_path / run_dir, uri=None)
    assert attached is not None
    attached.metrics(5, {"evaluation/loss": 2.0})
    attached.close()
    assert MlflowDatabase(tmp_path / "team.db").rows("select step from metrics") == [(5,)]


def test_a_missing_store_is_not_created_by_later_commands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = tmp_path / "gone" / "mlflow.db"
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    write_record(run_dir, RunRecord("1", f"sqlite:///{gone}"))
    attached = attach(run_dir, uri=f"sqlite:///{gone}")
    assert attached is not None
    attached.metrics(1, {"loss": 1.0})
    attached.close()
    assert f"{gone} does not exist" in caplog.text
    assert "MLFLOW_TRACKING_URI" in caplog.text
    assert not gone.parent.exists()


def test_a_killed_run_is_ended_by_the_next_one_beside_it(tmp_path: Path) -> None:
    """Three kinds of runs that were not ended: dead on this machine, alive on it, and on another machine."""
    folders = {name: tmp_path / "runs" / name for name in ("dead", "alive", "elsewhere")}
    changes = {"dead": {"process_started": 1}, "alive": {}, "elsewhere": {"machine": "another"}}
    for folder in folders.values():
        start(folder).finish("FINISHED")
    for name, folder in folders.items():
        record = read_record(folder)
        assert record is not None
        assert not record.is_open
        write_record(folder, RunRecord(record.run_id, record.uri, is_open=True))
        begin_incarnation(folder)
        values = json.loads((folder / "incarnation").read_text())
        (folder / "incarnation").write_text(json.dumps({**values, **changes[name]}))
    database = MlflowDatabase(tmp_path / "runs" / "mlflow.db")
    database.execute("update runs set status = 'RUNNING'")
    start(tmp_path / "runs" / "next").finish("FINISHED")
    assert dict(database.rows("select name, status from runs")) == {
        "dead": "KILLED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
        "next": "FINISHED",
    }
    assert [name for name, folder in folders.items() if (record := read_record(folder)) and record.is_open] == [
        "alive",
        "elsewhere",
    ]
