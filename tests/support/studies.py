"""A study of the small run, and what its commands leave behind, without a process."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.load import dump_run, load_run
from configs.paths import config_file, metrics_path, run_folder
from configs.schema import RunConfig
from launch.study.processes import Commands
from tests.support.compared_runs import add_report, save
from training.checkpoint.manifest import model_sha256, read_manifest, step_folder

STUDY: dict[str, Any] = {
    "name": "small",
    "base": "run.yaml",
    "dir": "study",
    "set": {"parallel.tensor": 1, "parallel.pipeline": 1, "checkpoint.every": 5},
    "lengths": [32, 64],
    "runs": {"alibi": {"seeds": [1, 2]}, "rotary": {"set": {"model.position": "rotary"}}},
}
PERPLEXITIES = {"alibi-seed1": 20.0, "alibi-seed2": 22.0}
OTHERS = 30.0  # perplexity of the other runs


def write_study(**changes: Any) -> str:
    """Write the study to the working directory, with some keys changed or, where None, left out; return its name."""
    values = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    Path("study.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return "study.yaml"


class StudyFiles:
    """Stands for the processes of a study: writes the files that its commands write.

    Attributes:
        calls: Each command with the name of its run.
        codes: Exit code of a command; 0 for those that are not here.
        stops: Commands during which a person presses Ctrl-C: a training is half done then.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.codes: dict[str, int] = {}
        self.stops: set[str] = set()

    def run(self, commands: Commands, *arguments: str) -> int:
        """Leave what a command would leave, and return its exit code."""
        name, *words = arguments
        config = _config_of(words)
        call = f"{name} {config.run.name}" if name != "prepare" else name
        self.calls.append(call)
        if call in self.stops:
            commands.asked += 1
        if code := self.codes.get(call, 0):
            return code
        if name == "train":
            _train(config, steps=config.train.steps // (2 if call in self.stops else 1))
        elif name == "evaluate" and call not in self.stops:
            _evaluate(config, words)
        return 0


def _config_of(words: list[str]) -> RunConfig:
    last = Path(words[-1])
    if last.parent.name == "checkpoints":
        return load_run(str(last / "config.yaml"))
    return load_run(str(last), overrides=[word for flag, word in _options(words) if flag == "--set"])


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    yield from zip(words[:-2:2], words[1:-2:2], strict=True)


def _train(config: RunConfig, *, steps: int) -> None:
    run_dir = run_folder(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = dump_run(config)
    config_file(run_dir).write_text(text)
    tokens = config.train.global_batch * config.data.sequence_length
    with metrics_path(run_dir).open("w") as file:
        for step in range(1, steps + 1):
            seconds = 0.5 / config.run.seed
            speed = {"step_seconds": seconds, "tokens_per_second": tokens / seconds, "memory_gb": 0.25}
            file.write(json.dumps({"step": step, "loss": 5.0, "tokens_seen": step * tokens, **speed}) + "\n")
    checkpoint = step_folder(run_dir / "checkpoints", step=steps)
    if not checkpoint.exists():
        save(checkpoint, text, step=steps)


def _evaluate(config: RunConfig, words: list[str]) -> None:
    options = dict(_options(words))
    lengths, file = options["--lengths"], options.get("--data")
    perplexity, step = PERPLEXITIES.get(config.run.name, OTHERS), config.train.steps
    weights = model_sha256(read_manifest(step_folder(run_folder(config) / "checkpoints", step=step)))
    values: Mapping[int, float] = {int(length): perplexity + int(length) / 32 for length in lengths.split(",")}
    of_file = {"text": file, "text_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}
    add_report(run_folder(config), dict(values), step=step, weights_sha256=weights, **of_file)
