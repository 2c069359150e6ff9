"""Run the training steps of a rank on fake tensors, and return what was seen."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import deepspeed.runtime.zero.partitioned_param_coordinator as zero_3
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import training.build
from configs.schema import RunConfig
from parallel.layout import Layout
from tests.support.simulated_gpu import Case
from tests.support.simulated_gpu.cuda import Stream
from tests.support.simulated_gpu.stand_ins import GPU, STAND_INS, VOCAB_SIZE, join_fake_ranks
from tests.support.simulated_gpu.tensors import AsFake, OnGpu, Seen
from training.memory import estimate_memory


def _stand_ins(config: RunConfig, layout: Layout, micro_batch: list[int], seen: Seen) -> ExitStack:
    """Replace what reads numbers, which fake tensors have none of."""
    split = layout.tensor if config.parallel.sequence else 1

    def received(engine: Any, _: int) -> Tensor:  # the first time, the stage before sends its states' shape
        rows, length = micro_batch
        shape, dtype = [length // split, rows, config.model.hidden], next(engine.module.parameters()).dtype
        states: Tensor = engine._allocate_or_extend_buffers(0, shape, dtype)
        return states

    stack = ExitStack()
    for target, name, stand_in in (
        *STAND_INS,
        (zero_3, "assert_ints_same_as_other_ranks", lambda *_: None),
        (PipelineEngine, "_recv_tensor_meta", received),
        *((waits, "synchronize", lambda *_: seen.wait("synchronize")) for waits in (torch.cuda, Stream)),
    ):
        stack.enter_context(patch.object(target, name, stand_in))
    return stack


def run(case: Case) -> dict[str, Any]:
    """Return what was seen of a rank."""
    config, layout, groups = join_fake_ranks(case)
    seen, train = Seen(), config.train
    rows = [train.micro_batch, *([2] if config.data.mask_documents else [])]
    shape = [train.micro_batch, config.data.sequence_length]
    with _stand_ins(config, layout, shape, seen), FakeTensorMode(allow_non_fake_inputs=True), OnGpu(seen), AsFake():
        engine, certificates = training.build.build_engine(
            config, layout=layout, groups=groups, vocab_size=VOCAB_SIZE, device=GPU, draws=False
        )
        for _ in range(2):
            seen.waits.clear()
            batches = list(torch.zeros(layout.micro_batches, *rows, config.data.sequence_length + 1, dtype=torch.int64))
            engine.train_step(batches, learning_rate=1e-4, loss_scale=1024.0 if train.precision == "fp16" else None)
        waits, peak = list(seen.waits), seen.peak
        state = engine.state()
        for name in state.parameters:
            for kind in state.kinds_of(name):
                state.read(name, kind)
        engine.mean_loss(batches)
        shape[1] //= 2
        engine.local_logits(torch.zeros(shape, dtype=torch.int64))
    stage = estimate_memory(config, layout=layout, on_gpu=True).stages[groups.pipeline.rank]
    return {
        "attention": certificates[0].backend,
        "waits": waits,
        "off_device": seen.off_device,
        "peak": peak,
        "estimate": stage.total - stage.overhead,
    }
