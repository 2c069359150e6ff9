"""Train tiny models on a synthetic recall corpus, one per position method, and measure what each one retrieves.

    python examples/recall.py alibi rotary

The run folders are runs/recall-METHOD. Each takes some five minutes on two CPU cores.
"""

import json
import subprocess
import sys
from pathlib import Path

from launch.show.retrieval import show_retrieval
from training.retrieval.corpus import write_recall_corpus

FOLDER = Path("runs/recall")
CORPUS = FOLDER / "corpus.jsonl"
DOCUMENTS = 40_000
SETTINGS = {
    "model.layers": 2,
    "model.hidden": 64,
    "data.sources": f"[{CORPUS}]",
    "data.dir": FOLDER / "data",
    "data.vocab_size": 398,  # whole words and single digits
    "data.split": 0.01,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "train.micro_batch": 16,
    "train.steps": 6000,
    "train.warmup_steps": 100,
    "train.learning_rate": 3e-3,
    "train.min_learning_rate": 3e-4,
    "checkpoint.every": 1000,
    "evaluate.every": 6000,
}


def main(methods: list[str]) -> None:
    """Run the commands that a user would type, then show what each model retrieves."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not CORPUS.exists():
        write_recall_corpus(CORPUS, documents=DOCUMENTS, seed=1)
    for method in methods:
        run_dir = Path(f"runs/recall-{method}")
        values = {**SETTINGS, "run.name": run_dir.name, "run.dir": run_dir, "model.position": method}
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        trainshort("prepare", "demo", *sets)
        trainshort("train", "demo", *sets, "--ranks", "1")  # on any number of GPUs
        trainshort("retrieval", str(run_dir), "--json", quiet=True)  # shown at the end
    for method in methods:
        run_dir = Path(f"runs/recall-{method}")
        (report,) = run_dir.glob("evaluation/*/retrieval/held-out.json")
        show_retrieval(json.loads(report.read_text(encoding="utf-8")), checkpoint=run_dir)


def trainshort(*arguments: str, quiet: bool = False) -> None:
    """Run a trainshort command; if it fails, exit with its code."""
    command = [sys.executable, "-P", "-m", "trainshort", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:] or ["alibi"])
