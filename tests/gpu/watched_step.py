"""Take optimizer steps on a GPU, and fail if one of them waits for it. Run by test_gpu.py, in a process of its own."""

import os
import tempfile

import torch

from configs.load import load_run
from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.start import ProcessRank, start
from tests.support.small_run import ONE_RANK, overrides_of, small_run
from training.build import build_engine

VOCABULARY, WARM_UP = 600, 3


def main() -> None:
    """Warm up, then let torch raise an error at each synchronisation."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    shape = {"model": {"hidden": 128, "heads": 4}, "train": {"precision": "bf16"}}
    config = load_run("demo", overrides=overrides_of(small_run(ONE_RANK, shape)))
    meet = f"file://{tempfile.mkdtemp()}/meet"
    device = start(ProcessRank(rank=0, world_size=1, local_rank=0, rendezvous=meet, starter="local"))
    layout = Layout.of(config, world_size=1)
    groups = make_groups(layout)
    engine, _ = build_engine(config, layout=layout, groups=groups, vocab_size=VOCABULARY, device=device)
    train, length = config.train, config.data.sequence_length
    count = train.global_batch // train.micro_batch
    batches = [torch.randint(0, VOCABULARY, (train.micro_batch, length + 1)).pin_memory() for _ in range(count)]
    for _ in range(WARM_UP):
        engine.train_step(batches, learning_rate=1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    outcome = engine.train_step(batches, learning_rate=1e-3)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.as_tensor(outcome.loss))
    assert float(outcome.grad_norm) > 0


if __name__ == "__main__":
    main()
