"""Fixtures of the cluster's tests: a folder with prepared data, and one uninterrupted run."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from tests.support.cluster import VALUES, Submitted, slurm, submit


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the login node, with data that a job prepared."""
    assert os.uname().nodename == "login", "this is not the login node: run `make test-slurm`"
    folder = tmp_path_factory.mktemp("home")
    (folder / "book.txt").write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    (folder / "small.yaml").write_text(yaml.safe_dump(VALUES))
    slurm("srun", f"--chdir={folder}", "--cpus-per-task=2", "trainshort", "prepare", "small.yaml")
    return folder


@pytest.fixture(scope="session")
def unbroken(home: Path) -> Submitted:
    """A run on two nodes x two ranks, one srun task each, whose chain ran to its end."""
    run = submit(home, "unbroken")
    for name in ("train", "evaluate", "export"):
        run.wait_for(name)
    return run
