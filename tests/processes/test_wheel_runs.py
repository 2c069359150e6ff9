"""The wheel holds every file it needs and works in an empty environment, from another folder."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
PACKAGES = ["configs", "parallel", "data_pipeline", "training", "launch"]


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, without the build folders of the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "trainshort.py", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, copy)
    for name in [*PACKAGES, "tests"]:
        shutil.copytree(HOUSE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "-o", "out", folder=copy)
    return next((copy / "out").glob("trainshort-*.whl"))


def test_the_wheel_holds_the_packages_the_runs_and_the_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {*PACKAGES, "trainshort.py"}
    wanted = [file for package in PACKAGES for file in (HOUSE / package).rglob("*") if file.is_file()]
    expected = {file.relative_to(HOUSE).as_posix() for file in wanted if "__pycache__" not in file.parts}
    assert {name for name in names if name.split("/")[0] in PACKAGES} == expected


def test_the_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", str(home), folder=elsewhere)
    python = str(home / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", str(wheel), folder=elsewhere)
    installed = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=elsewhere).strip()
    # Borrow the dependencies with a .pth file: Python does not process the .pth files of the folder that it names.
    (Path(installed) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = "import trainshort, launch.cli, parallel.layout; print(trainshort.__file__, launch.cli.__file__)"
    assert all(path.startswith(str(home)) for path in run(python, "-c", where, folder=elsewhere).split())
    program = str(home / "bin" / "trainshort")
    assert "demo is valid" in run(program, "check", "demo", folder=elsewhere)
    assert run(program, "slurm", "alibi-1b3", "--nodes", "2", folder=elsewhere).count("#!/bin/bash") == 3
