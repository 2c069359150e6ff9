"""`watch` on a terminal: it follows the run, and Ctrl-C leaves the terminal as it was."""

import json
from dataclasses import asdict
from pathlib import Path

from tests.support.command_terminal import CommandTerminal
from tests.support.processes import PATIENCE_SECONDS
from tests.support.run_folders import make_run, start_run
from tests.support.steps import step_result


def test_ctrl_c_ends_what_follows_a_run(tmp_path: Path) -> None:
    run_dir = start_run(make_run(tmp_path / "my", last=4))
    terminal = CommandTerminal("watch", str(run_dir), "--every", "0.1", term="xterm")
    try:
        terminal.wait_for("step 4/10")
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(asdict(step_result(step=5))) + "\n")
        terminal.wait_for("step 5/10  50%  0.5 s left")
        terminal.type(b"\x03")
        assert terminal.process.wait(timeout=PATIENCE_SECONDS) == 130
        terminal.wait_for("\\^C")
        assert "\x1b[?" not in terminal.shown
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()
