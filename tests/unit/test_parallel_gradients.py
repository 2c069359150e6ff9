"""What is sent to the other ranks between the backward pass and the optimizer; tensors of a GPU are faked."""

from types import SimpleNamespace
from typing import Any

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
    """The part of ZeRO's optimizer that computes a norm, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.norm_is_on, self.sent = device, list[Tensor]()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return torch.tensor(3.0, device=self.norm_is_on)

    def _model_parallel_all_reduce(self, tensor: Tensor, op: Any) -> None:
        assert op is dist.ReduceOp.SUM
        self.sent.append(tensor)


@pytest.mark.parametrize("norm_is_on", [GPU, CPU], ids=["state on the GPU", "state on the CPU"])
def test_the_norm_is_sent_from_the_gpu(norm_is_on: torch.device) -> None:
    optimizer = PartitionedGradients(norm_is_on)
    engine, groups = SimpleNamespace(optimizer=optimizer, device=GPU), Groups(*[None] * 5)  # type: ignore[arg-type]
    with FakeTensorMode():
        patch_gradients(engine, groups=groups, clip=1.0)
        norm = optimizer.scaled_global_norm()
    assert [tensor.device for tensor in optimizer.sent] == [GPU]  # NCCL sends from GPUs alone
    assert norm.device == norm_is_on  # where DeepSpeed clips with it
