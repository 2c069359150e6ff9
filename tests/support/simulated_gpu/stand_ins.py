"""What is replaced where ranks run on fake tensors: kernels, and what reads numbers, which these tensors lack."""

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # it registers itself

import training.model.kernels.flex as flex
import training.model.proof.certificate as certificate
from configs.load import load_run
from configs.schema import RunConfig
from parallel.axes import Groups
from parallel.groups import make_groups
from parallel.layout import Layout
from tests.support.simulated_gpu import Case
from tests.support.simulated_gpu.tensors import move

GPU = torch.device("cuda", 0)
VOCAB_SIZE = 50257


class _Generator(torch.Generator):
    """A generator that says it is the GPU's; a build for CPUs has none, and fake tensors draw nothing."""

    device = GPU

    def __new__(cls, _: Any = None) -> "_Generator":
        return super().__new__(cls)


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


def every_ranks(value: Any, *, group: Any) -> list[Any]:
    """Stand in for `all_gather_object`: all ranks have the same."""
    return [value] * group.size


STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch, "Generator", _Generator),
    (certificate, "all_gather_object", every_ranks),
    (certificate, "hash_slopes", lambda _: ""),
    (certificate, "check_certificates", lambda *_, **__: None),
    (flex, "flex_kernel", _flex_kernel),
    *((nn.Module, name, move) for name in ("to", "bfloat16", "half", "float")),
)


def join_fake_ranks(case: Case) -> tuple[RunConfig, Layout, Groups]:
    """Make this process the rank of a case, among ranks that are not there."""
    os.environ |= {"LOCAL_RANK": "0", "RANK": str(case.rank), "WORLD_SIZE": str(case.world_size)}
    dist.init_process_group("fake", rank=case.rank, world_size=case.world_size, store=dist.HashStore())  # type: ignore[attr-defined]
    config = load_run("alibi-1b3-80gb", overrides=["train.compile=off", *case.overrides])
    layout = Layout.of(config, world_size=case.world_size)
    with patch.object(dist.distributed_c10d, "_store_based_barrier", lambda *_: None):
        return config, layout, make_groups(layout)
