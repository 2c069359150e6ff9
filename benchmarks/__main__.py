"""Run benchmarks, each in a process of its own: `python -m benchmarks [NAME ...]`.

Unless named, all on a CPU but `windows`, which trains a model first and takes half an hour.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("train_step", "ranks", "positions", "attention", "generation", "exported_code", "checkpoint", "prepare")


def main() -> int:
    """Run the named benchmarks; return the number of those that failed."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    failed = 0
    for part in sys.argv[1:] or PARTS:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-P", "-m", f"benchmarks.{part}"], env=environment)
        failed += done.returncode != 0
        print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
