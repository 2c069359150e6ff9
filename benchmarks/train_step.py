"""Time a step of `trainshort train` against transformers' Bloom of the same shape. Prints a JSON line a shape.

Ours is read from metrics.jsonl, so it counts all that a user waits for: the engine, reading, the exchange of figures.
The two take turns, so that load from elsewhere slows both. At the first shape, `trainshort profile` adds the share of
matrix products. Compare ratios between machines, not seconds.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.commands import Bench, Shape
from benchmarks.machine import print_result
from training.profiling.categories import MATRIX

# shape, rounds, steps of a round
CASES = (
    (Shape(1024, 16, 4, 1024), 2, 4),
    (Shape(1024, 16, 4, 2048), 1, 4),
    (Shape(1024, 16, 1, 8192), 1, 3),
)


def main() -> None:
    """Measure each shape."""
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        for number, (shape, rounds, steps) in enumerate(CASES):
            _measure(bench, shape, rounds=rounds, steps=steps, profiles=number == 0)


def _measure(bench: Bench, shape: Shape, *, rounds: int, steps: int, profiles: bool) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    memory = {"trainshort": 0.0, "transformers": 0.0}
    for _ in range(rounds):
        mine = bench.train(shape.overrides(), steps=steps)
        peer = _bloom(shape, steps=steps)
        ours += mine.seconds
        theirs += peer["seconds"]
        memory["trainshort"] = max(memory["trainshort"], mine.memory_gb)
        memory["transformers"] = max(memory["transformers"], peer["memory_gb"])
    shares = {}
    if profiles:
        categories = bench.profile(shape.overrides(), steps=2)["categories"]
        shares = {row["name"]: round(row["share"], 3) for row in categories}
    print_result(
        "train_step",
        **asdict(shape),
        seconds={"trainshort": round(median(ours), 3), "transformers": round(median(theirs), 3)},
        times_faster=round(median(theirs) / median(ours), 3),
        memory_gb={name: round(value, 2) for name, value in memory.items()},
        memory_ratio=round(memory["trainshort"] / memory["transformers"], 3),
        **({"matrix_products_share": shares.get(MATRIX), "shares": shares} if profiles else {}),
    )


def _bloom(shape: Shape, *, steps: int) -> dict:
    command = [sys.executable, "-P", "-m", "benchmarks.peers", json.dumps(asdict(shape)), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
