"""What ranks of a GPU do between the backward pass and the optimizer; there is none, so its tensors are faked."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.axes import Groups
from parallel.gradients import patch_gradients
from parallel.libraries import DeepSpeedZeroOptimizer

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class PartitionedGradients(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """The part of ZeRO's optimizer that computes a norm, on one device, and reduces gradients."""

    def __init__(self, device: torch.device, *, overlaps: bool = False) -> None:
        self.norm_is_on, self.sent = device, list[Tensor]()
        self.overlap_comm = overlaps
        self.reduction_stream = "the stream that reduces"

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return torch.tensor(3.0, device=self.norm_is_on)

    def _model_parallel_all_reduce(self, tensor: Tensor, op: Any) -> None:
        assert op is dist.ReduceOp.SUM
        self.sent.append(tensor)

    def average_tensor(self, tensor: Any, communication_data_type: torch.dtype) -> None:
        tensor.reduce()


def patched(optimizer: PartitionedGradients) -> PartitionedGradients:
    engine, groups = SimpleNamespace(optimizer=optimizer, device=GPU), Groups(*[None] * 5)  # type: ignore[arg-type]
    patch_gradients(engine, groups=groups, clip=1.0)
    return optimizer


@pytest.mark.parametrize("norm_is_on", [GPU, CPU], ids=["state on the GPU", "state on the CPU"])
def test_the_norm_is_sent_from_the_gpu(norm_is_on: torch.device) -> None:
    optimizer = patched(PartitionedGradients(norm_is_on))
    with FakeTensorMode():
        norm = optimizer.scaled_global_norm()
    assert [tensor.device for tensor in optimizer.sent] == [GPU]  # NCCL sends from GPUs alone
    assert norm.device == norm_is_on  # where DeepSpeed clips with it


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_gradient_in_flight_keeps_its_memory(overlaps: bool) -> None:
    optimizer, gradient = patched(PartitionedGradients(GPU, overlaps=overlaps)), Mock()
    optimizer.average_tensor(gradient, torch.float32)
    kept = [call.record_stream("the stream that reduces")] * overlaps
    assert gradient.mock_calls == [*kept, call.reduce()]
