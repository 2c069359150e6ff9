"""The keys that `compare` calls different: those that say something of a run, and name another thing than its like."""

from pathlib import Path
from typing import Any

import pytest

from launch.show.comparison import difference_rows
from tests.support.compared_runs import make_run
from training.comparison.comparison import compare_runs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differences(*runs: str | Path) -> dict[str, list[Any]]:
    return compare_runs([*map(Path, runs)], text=None).differences


def test_one_place_spelled_twice_is_no_difference(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(Path("runs/own"))
    for name, folder in (("average", here / "runs/own/data"), ("up", "runs/../runs/own/data"), ("away", "data")):
        make_run(Path("runs") / name, data={"dir": str(folder)})
    assert differences("runs/own", "runs/average", "runs/up") == {}
    away = {"data.dir": [None, "data"]}
    assert differences("runs/own", "runs/away") == away
    monkeypatch.chdir("runs/own")
    assert differences(".", "../average") == {}
    assert differences(".", "../away") == away


def test_one_trunk_spelled_twice_is_no_difference(here: Path) -> None:
    trunk = make_run(Path("trunk"))
    points = (f"{trunk}/checkpoints/step_0000010", f"{here}/trunk/checkpoints/step_0000010", "other", None)
    for name, point in zip("abcd", points, strict=True):
        make_run(Path(name), train={"branch_from": point})
    assert differences("a", "b") == {}
    assert differences("a", "c", "d") == {"train.branch_from": [points[0], "other", None]}


def test_a_trunk_is_called_by_its_run(here: Path) -> None:
    make_run(Path("x/trunk"))
    make_run(Path("y/trunk"))
    points = ("x/trunk/checkpoints/step_0000010", "y/trunk", f"{here}/x/trunk", "b/checkpoints/step_1234567", "none")
    for name, point in zip("abcde", points, strict=True):
        make_run(Path(name), train={"branch_from": point})

    def cells(*runs: str) -> list[str]:
        [(key, values)] = difference_rows(compare_runs([*map(Path, runs)], text=None))
        assert key == "train.branch_from"
        return values

    assert cells("a", "c", "d", "e") == ["trunk at step 10", "trunk", "b at step 1,234,567", "none"]
    # a name that would stand for two runs stands for the first; those of compared runs are told apart
    assert cells("a", "b") == ["trunk at step 10", "y/trunk"]
    make_run(Path("f"), train={"branch_from": None, "init_from": "x/trunk"})
    comparison = compare_runs([*map(Path, ("y/trunk", "x/trunk", "b", "f"))], text=None)
    assert dict(difference_rows(comparison)) == {
        "train.branch_from": ["null", "null", "y/trunk", "null"],
        "train.init_from": ["null", "null", "null", "x/trunk"],
    }
    Path("y/trunk/config.yaml").write_text("[")
    assert cells("b", "d") == ["y/trunk", "b at step 1,234,567"]


def test_an_import_has_no_keys_of_training() -> None:
    trained = {"train": {"steps": 40, "global_batch": 16}, "data": {"split": 0.2, "dir": "data"}, "run": {"seed": 2}}
    make_run(Path("a"), **trained)
    make_run(Path("b"), **trained, model={"position": "rotary"})
    make_run(Path("imported"), steps=0, checkpoints=(0,), model={"heads": 2})
    assert differences("a", "imported") == {"model.heads": [4, 2]}
    trained["train"]["steps"] = 50
    make_run(Path("c"), **trained)
    comparison = compare_runs([Path(name) for name in ("b", "imported", "c")], text=None)
    assert comparison.differences["train.steps"] == [40, None, 50]
    assert difference_rows(comparison) == [
        ("model.heads", ["4", "2", "4"]),
        ("model.position", ["rotary", "alibi", "alibi"]),
        ("train.steps", ["40", "-", "50"]),
    ]
