"""An export or import that a scheduler or `timeout` ends leaves nothing beside its --out."""

import subprocess
import sys
from pathlib import Path

import pytest

# Waits for SIGTERM where a real one writes gigabytes.
SCRIPT = """
import os, signal
from launch.cli import run_command_line
from launch.local import STOPPED_BY_HAND
from training.export import folder

def ended(out):
    with folder.new_folder(out) as partial:
        (partial / "model.safetensors").touch()
        os.kill(os.getpid(), signal.SIGTERM)

folder.try_new_folder = ended
try: run_command_line()
except SystemExit as stopped: assert stopped.code == STOPPED_BY_HAND, stopped
else: raise AssertionError
"""


@pytest.mark.parametrize("command", [["export", "run", "--format", "hf"], ["import", "model"]])
def test_sigterm_removes_the_temporary_folder(tmp_path: Path, command: list[str]) -> None:
    arguments = [sys.executable, "-P", "-c", SCRIPT, *command, "--out", "deep/out"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
