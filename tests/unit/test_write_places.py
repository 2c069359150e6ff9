"""Folders are tried before long work: what would fail at its end is refused at its start, and leaves nothing."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import MachineError
from configs.files import try_folder
from configs.load import check_run
from parallel.layout import Layout
from tests.support.one_rank import STEPS, OneRank
from training.checkpoint.manifest import list_checkpoints
from training.folder import claim_run_folder


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "kept", tmp_path / "kept" / "c"):
        try_folder(folder)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "kept"]
    (tmp_path / "kept" / "file").write_text("kept")
    for folder in (tmp_path / "kept" / "file", tmp_path / "kept" / "file" / "deep"):
        with pytest.raises(OSError, match="file"):
            try_folder(folder)
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_a_trial_renames_as_the_work_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="not permitted"):
        try_folder(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["file", "link"])
def test_a_run_that_could_not_save_is_refused_at_its_start(
    tmp_path: Path, run_values: dict[str, Any], taken: str
) -> None:
    run_values["parallel"] = {}
    config = check_run(run_values, name="small")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.parent.mkdir()
    if taken == "file":
        checkpoints.write_text("a file")
    else:
        checkpoints.symlink_to("nowhere")
    with pytest.raises(MachineError, match=r"run folder .* cannot be written \(File exists\)"):
        claim_run_folder(config, layout=Layout.of(config, world_size=1), device=torch.device("cpu"))
    assert not (tmp_path / "run" / "incarnation").exists(), "an older start must not be superseded"


def test_an_index_that_cannot_be_written_is_said(rank: OneRank, tmp_path: Path) -> None:
    shutil.copytree(rank.prepared.folder, tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    (tmp_path / "data" / "index").write_text("a file")
    elsewhere = replace(rank, prepared=replace(rank.prepared, folder=tmp_path / "data"))
    with pytest.raises(MachineError, match=r"the index of samples \S+/data/index/\S+ cannot be written \(.*\): copy "):
        elsewhere.trainer(rank.config(tmp_path / "run"))


def test_a_file_or_a_dead_link_in_a_steps_place_is_replaced(
    rank: OneRank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step_0000001").symlink_to(tmp_path / "nowhere")
    (checkpoints / "step_0000002").write_text("a note")
    rank.start(tmp_path, "checkpoint.every=1", "checkpoint.keep=9")
    assert [saved.step for saved in list_checkpoints(tmp_path)] == list(range(1, STEPS + 1))
    assert sorted(checkpoints.iterdir()) == [saved.path for saved in list_checkpoints(tmp_path)]
    assert caplog.text.count("exists already and was skipped as broken: it is replaced") == 2
    assert "cannot be removed" not in caplog.text
