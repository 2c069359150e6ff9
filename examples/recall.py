"""Train tiny models on a synthetic recall corpus, one per position method, and measure how far each one retrieves.

    python examples/recall.py alibi rotary

Each takes a few minutes on two CPU cores. The run folders are runs/recall-METHOD.
"""

import json
import subprocess
import sys
from pathlib import Path

from launch.show.retrieval import show_retrieval
from training.retrieval.corpus import write_recall_corpus

FOLDER = Path("runs/recall")
CORPUS = FOLDER / "corpus.jsonl"
DOCUMENTS = 60_000
SETTINGS = {
    "model.layers": 2,
    "model.hidden": 128,
    "model.heads": 4,
    "data.sources": f"[{CORPUS}]",
    "data.dir": FOLDER / "data",
    "data.vocab_size": 512,
    "data.sequence_length": 128,
    "data.split": 0.01,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "train.micro_batch": 16,
    "train.steps": 3000,
    "train.warmup_steps": 100,
    "train.learning_rate": 3e-3,
    "train.min_learning_rate": 3e-4,
    "checkpoint.every": 3000,
    "evaluate.every": 1000,
}


def main(methods: list[str]) -> None:
    """Run the commands that a user would type, then show what each model retrieves."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not CORPUS.exists():
        write_recall_corpus(CORPUS, documents=DOCUMENTS, seed=1)
    for method in methods:
        name = f"recall-{method}"
        values = {**SETTINGS, "run.name": name, "run.dir": f"runs/{name}", "model.position": method}
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        trainshort("prepare", "demo", *sets)
        trainshort("train", "demo", *sets)
        trainshort("retrieval", f"runs/{name}", "--json")
    for method in methods:
        (report,) = Path(f"runs/recall-{method}/evaluation").glob("*/retrieval/held-out.json")
        show_retrieval(json.loads(report.read_text(encoding="utf-8")), checkpoint=Path(f"runs/recall-{method}"))


def trainshort(*arguments: str) -> None:
    """Run a trainshort command; if it fails, exit with its code."""
    command = [sys.executable, "-P", "-m", "trainshort", *arguments]
    is_shown_later = arguments[0] == "retrieval"
    done = subprocess.run(command, stdout=subprocess.DEVNULL if is_shown_later else None, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:] or ["alibi"])
