"""Run a rank on fake tensors, and return what was seen."""

import os
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import deepspeed.runtime.zero.partitioned_param_coordinator as zero_3
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # it registers itself

import training.build
import training.model.kernels.flex
from configs.load import load_run
from configs.schema import RunConfig
from parallel.groups import make_groups
from parallel.layout import Layout
from tests.support.simulated_gpu import Case
from tests.support.simulated_gpu.cuda import Stream
from tests.support.simulated_gpu.tensors import AsFake, OnGpu, Seen, move
from training.memory import estimate_memory

GPU = torch.device("cuda", 0)
VOCAB_SIZE = 50257


class _Kept(torch.autograd.Function):
    """What FlexAttention keeps and returns."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries, width = q.shape
        out = q.new_empty(queries, batch, heads, width)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, queries, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _flex_kernel(*_: bool) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, kernel_options: Any) -> Tensor:
        number = torch.zeros((), dtype=torch.int32, device=q.device)
        if score_mod is not None:
            score_mod(number.float(), *[number] * 4)  # its slopes lie on the GPU
        for counts in (block_mask.kv_num_blocks, block_mask.full_kv_num_blocks):
            assert counts is None or counts.device == q.device, f"a block mask lies on {counts.device}"
        out: Tensor = _Kept.apply(q, k, v)
        return out

    return attend


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
        (training.build, "certify", lambda *_, **__: []),
        (training.model.kernels.flex, "flex_kernel", _flex_kernel),
        (zero_3, "assert_ints_same_as_other_ranks", lambda *_: None),
        (PipelineEngine, "_recv_tensor_meta", received),
        *((waits, "synchronize", lambda *_: seen.wait("synchronize")) for waits in (torch.cuda, Stream)),
        *((nn.Module, name, move) for name in ("to", "bfloat16", "half", "float")),
    ):
        stack.enter_context(patch.object(target, name, stand_in))
    return stack


def run(case: Case) -> dict[str, Any]:
    """Return what was seen of a rank."""
    os.environ |= {"LOCAL_RANK": "0", "RANK": str(case.rank), "WORLD_SIZE": str(case.world_size)}
    dist.init_process_group("fake", rank=case.rank, world_size=case.world_size, store=dist.HashStore())  # type: ignore[attr-defined]
    config = load_run("alibi-1b3-80gb", overrides=["train.compile=off", *case.overrides])
    layout, seen, train = Layout.of(config, world_size=case.world_size), Seen(), config.train
    rows = [train.micro_batch, *([2] if config.data.mask_documents else [])]
    shape = [train.micro_batch, config.data.sequence_length]
    with patch.object(dist.distributed_c10d, "_store_based_barrier", lambda *_: None):
        groups = make_groups(layout)
    with _stand_ins(config, layout, shape, seen), FakeTensorMode(allow_non_fake_inputs=True), OnGpu(seen), AsFake():
        engine, _ = training.build.build_engine(
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
    return {"waits": waits, "off_device": seen.off_device, "peak": peak, "estimate": stage.total - stage.overhead}
