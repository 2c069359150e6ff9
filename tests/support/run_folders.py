"""Run folders as training leaves them, written without training: for tests of what is read from them."""

import json
from pathlib import Path

from configs.load import dump_run, load_run
from configs.paths import checkpoints_folder, config_file, incarnation_file
from training.incarnation import begin_incarnation


def make_run(folder: Path, *overrides: str, steps: int = 10, last: int = 0, saved: tuple[int, ...] = ()) -> Path:
    """Write a run folder that was trained to step `last` of `steps`, with the checkpoints `saved`; return it."""
    folder.mkdir(parents=True)
    sets = [f"run.dir={folder}", f"train.steps={steps}", "train.warmup_steps=1", *overrides]
    config_file(folder).write_text(dump_run(load_run("demo", overrides=sets)), encoding="utf-8")
    lines = [
        {"step": step, "loss": 9.0 - step / 10} | ({"validation_loss": 8.0 - step / 10} if step % 4 == 0 else {})
        for step in range(1, last + 1)
    ]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for step in saved:
        checkpoint = checkpoints_folder(folder) / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text('{\n "format": 2,\n "step": 1,\n "validation_loss": 7.25,\n "x": 0}')
    return folder


def start_run(folder: Path, **changes: object) -> Path:
    """Record a start of a run by this process, with some values of the record changed; return the folder."""
    begin_incarnation(folder)
    values = json.loads(incarnation_file(folder).read_text(encoding="utf-8"))
    incarnation_file(folder).write_text(json.dumps({**values, **changes}), encoding="utf-8")
    return folder
