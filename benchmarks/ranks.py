"""Time `trainshort train` on two ranks of one thread each against one rank of two threads. Prints one JSON line.

Tensor 2: its tokens/s relative to one rank. Pipeline 2 with 8 micro-batches: what is missing to one rank's tokens/s
is the bubble, and what the stages' imbalance and communication add to it.
"""

import tempfile
from pathlib import Path

from benchmarks.commands import Bench, Shape
from benchmarks.machine import print_result

SHAPE, STEPS, MICRO_BATCHES = Shape(1024, 16, 4, 256), 3, 8


def main() -> None:
    """Train the same model in each layout; one rank first and last, so that a drift of the machine shows."""
    one, tensor, pipeline = ["OMP_NUM_THREADS", "2"], ["parallel.tensor=2"], ["parallel.pipeline=2"]
    keys = [*SHAPE.overrides(), f"train.global_batch={MICRO_BATCHES}"]
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        first = bench.train(keys, steps=STEPS, environment=dict([one]))
        by_tensor = bench.train([*keys, *tensor], steps=STEPS, ranks=2, environment={"OMP_NUM_THREADS": "1"})
        by_pipeline = bench.train([*keys, *pipeline], steps=STEPS, ranks=2, environment={"OMP_NUM_THREADS": "1"})
        last = bench.train(keys, steps=STEPS, environment=dict([one]))
    alone = (first.tokens_per_second + last.tokens_per_second) / 2
    print_result(
        "ranks",
        tokens_per_second={
            "one rank, two threads": [round(first.tokens_per_second), round(last.tokens_per_second)],
            "tensor 2": round(by_tensor.tokens_per_second),
            "pipeline 2": round(by_pipeline.tokens_per_second),
        },
        tensor_2_ratio=round(by_tensor.tokens_per_second / alone, 3),
        pipeline_2_bubble=round(1 - by_pipeline.tokens_per_second / alone, 3),
        pipeline_2_theory=round(1 / (MICRO_BATCHES + 1), 3),
    )


if __name__ == "__main__":
    main()
