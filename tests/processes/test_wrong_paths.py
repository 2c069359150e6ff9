"""A wrong path, word or number is answered before anything slow is imported: all commands in one fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.command_line import write_run

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0"
HEAVY = ("torch", "deepspeed", "megatron", "mlflow", "transformers", "matplotlib", "pyarrow")
# Runs each command line of standard input; prints its exit code, its error and the heavy modules that it loaded.
SCRIPT = f"""
import contextlib, io, json, sys
from launch.cli import run_command_line
for arguments in json.load(sys.stdin):
    sys.argv, error = ["trainshort", *arguments], io.StringIO()
    with contextlib.redirect_stderr(error):
        try: run_command_line()
        except SystemExit as ended: code = ended.code
    heavy = sorted(sys.modules.keys() & set({HEAVY!r}))
    print("\\n" + json.dumps([code, error.getvalue(), heavy]))
"""

# The command line, a # in it for the run folder, and how its error begins.
WRONG = {
    "prepare run.yaml": "data source book.txt does not exist: ",
    "prepare run.yaml --set data.tokenizer=no.model --set data.sources=[run.yaml]": "tokenizer no.model cannot be read",
    "prepare run.yaml --set run.dir=run.yaml": "run.dir run.yaml: run.yaml is a file",
    "train run.yaml": "data is not prepared in data ",
    "train run.yaml --dry-run": "data is not prepared in data ",
    "train run.yaml --ranks 3": "ranks must be a multiple of",
    "train no.yaml": "run file no.yaml does not exist: ",
    "evaluate no": "checkpoint no does not exist: ",
    "evaluate run.yaml": "checkpoint run.yaml is a file: ",
    "evaluate #": "data is not prepared in ",
    "evaluate # --data no.txt": "data source no.txt does not exist: ",
    "evaluate # --data empty": "evaluation text empty is a folder: ",
    "evaluate # --data table.csv": "data source table.csv is a table: ",
    "evaluate # --protocol rolling": "protocol 'rolling' is not known: ",
    "evaluate # --protocol sliding:9 --lengths 8,16": "protocol sliding:9 moves further than its window of 8 tokens",
    "evaluate # --lengths 1": "--lengths must be whole numbers from 2",
    "generate no --prompt x": "checkpoint no does not exist: ",
    "generate empty --prompt x": "is not a checkpoint",
    "generate #": "--prompt TEXT or --prompt-file FILE must be given",
    "generate # --prompt-file no.txt": "--prompt-file no.txt cannot be read",
    "generate # --prompt x --temperature -1": "temperature must be 0 or more",
    "export no --format hf --out out": "checkpoint no does not exist: ",
    "export # --format onnx --out out": "format 'onnx' is not known: ",
    "export # --format hf --out run.yaml": "folder run.yaml is a file: ",
    "compare no other": "run no does not exist: ",
    "checkpoint list no": "run folder no does not exist: ",
    "checkpoint verify no": "checkpoint no does not exist: ",
    "checkpoint reshape no": "checkpoint no does not exist: ",
    "checkpoint reshape no --dry-run": "checkpoint no does not exist: ",
    "checkpoint average no --out out": "checkpoint no does not exist: ",
    "checkpoint average # --out out": "step_0000002 would be the only checkpoint of the average: ",
    "checkpoint average # --out run.yaml": "folder run.yaml is a file: ",
    "jobs status no": "run folder no does not exist: ",
    "jobs stop no": "run folder no does not exist: ",
    "jobs resume no": "run folder no does not exist: ",
    "slurm no.yaml": "run file no.yaml does not exist: ",
    "slurm run.yaml --set run.dir=run.yaml": "run.dir run.yaml: run.yaml is a file",
    "doctor --alibi no.yaml": "run file no.yaml does not exist: ",
    "doctor --alibi run.yaml --set model.position=rotary": "--alibi audits ALiBi, but model.position is rotary: ",
    "runs no": "folder no does not exist: ",
    "init a/b": "NAME is the name of a run, not a path",
}


def test_wrong_input_is_answered_before_slow_imports(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    # as a run folder is without its data, which may be on another machine
    shutil.copytree(OLD_RUN, tmp_path / "old", ignore=shutil.ignore_patterns("data"))
    commands = [line.replace("#", "old").split() for line in WRONG]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        cwd=tmp_path,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(commands)
    for (command, expected), (code, error, heavy) in zip(WRONG.items(), answers, strict=True):
        assert (code, heavy) == (2, []), (command, error)
        assert len(error.splitlines()) == 1, (command, error)
        assert expected in error, (command, error)
