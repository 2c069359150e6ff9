"""Runs of a study that branch off: rows and run folders know the checkpoint, however the study spells it."""

import json
from pathlib import Path

import pytest

from launch.study.processes import Commands
from tests.support.command_line import Call, refused
from tests.support.studies import StudyFiles, write_study

ROWS = Path("study.rows.jsonl")
TRUNK, STEP = "study/trunk-seed1", "checkpoints/step_0000010"


def write_branch(key: str, place: str) -> str:
    """Write a study of a trunk and a run that begins with a checkpoint of it; return its name."""
    own = {key: place, "train.schedule": "wsd", "train.steps": 15}
    return write_study(runs={"trunk": {"set": {"train.schedule": "constant"}}, "own": {"set": own}})


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("key", ["train.branch_from", "train.init_from"])
def test_a_checkpoint_may_be_spelled_differently(trainshort: Call, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    files = StudyFiles()
    monkeypatch.setattr(Commands, "run", lambda self, *arguments: files.run(self, *arguments))
    monkeypatch.setattr("training.study.plot.draw_study", lambda _: None)

    def study(place: str) -> list[str]:
        files.calls.clear()
        answer = trainshort("study", write_branch(key, place))
        assert answer.code == 0, answer
        return files.calls

    assert "train own-seed1" in study(f"{TRUNK}/{STEP}")
    row, folder = ROWS.read_text(), Path("study/own-seed1")
    for place in (f"./{TRUNK}/{STEP}", f"study/../{TRUNK}/{STEP}", str(Path(TRUNK).absolute() / STEP)):
        assert study(place) == [], "the row says that it is finished"
        ROWS.unlink()
        assert study(place) == [], "the folder holds it"
        ROWS.write_text(row)
    folder.rename("study/away")
    other = "step_0000005"
    for place in (f"{TRUNK}/checkpoints/{other}", f"other/{STEP}"):
        assert f'{key} was "{TRUNK}/{STEP}", is "{place}"' in refused(trainshort, "study", write_branch(key, place))
    if key == "train.init_from":  # the folder's newest checkpoint may be another one by now
        assert f'is "{TRUNK}"' in refused(trainshort, "study", write_branch(key, TRUNK))
        return
    assert study(TRUNK) == [], "it is the run folder of the checkpoint that was taken"
    # of a trunk that is named by its folder, the row has the checkpoint that the first start took
    Path("study/away").rename(folder)
    ROWS.unlink()
    study(TRUNK)
    assert json.loads(ROWS.read_text().splitlines()[-1])["config"][key] == f"{TRUNK}/{STEP}"
