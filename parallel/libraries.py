"""Import what we use of DeepSpeed and megatron-core, without two slow parts.

At import, DeepSpeed loads mlflow for its autotuner and megatron-core passes fused operations to torch.compile.
Together these take more than half of a rank's start-up time, and we use neither.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from parallel.start import choose_accelerator, quiet_libraries


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    # stands in for torch.compile, which is also a decorator with arguments
    return function if function is not None else lambda later: later


@contextmanager
def _lean() -> Iterator[None]:
    choose_accelerator()
    quiet_libraries()
    mlflow_is_there = "mlflow" in sys.modules
    if not mlflow_is_there:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # so that importing it fails, as if it were not installed
    with patch.object(torch, "compile", _uncompiled):
        yield
    if not mlflow_is_there:
        del sys.modules["mlflow"]


with _lean():
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime import engine as runtime_engine
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    # DeepSpeed imports it when an engine is built, for an optimizer that we do not use, and passes it to torch.compile.
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    # Import by name: the attribute `deepspeed.comm.torch` is torch itself.
    deepspeed_backend = importlib.import_module("deepspeed.comm.torch")
    deepspeed_comm = importlib.import_module("deepspeed.comm.comm")
    megatron_layers = importlib.import_module("megatron.core.tensor_parallel.layers")

__all__ = [
    "BF16_Optimizer",
    "BackwardPass",
    "ColumnParallelLinear",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "LayerSpec",
    "ModelParallelConfig",
    "NoopTimer",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "PipelineParallelGrid",
    "ReduceTiedGrads",
    "RowParallelLinear",
    "TiedLayerSpec",
    "VocabParallelEmbedding",
    "ZeroParamStatus",
    "copy_to_tensor_model_parallel_region",
    "deepspeed",
    "deepspeed_backend",
    "deepspeed_comm",
    "gather_from_sequence_parallel_region",
    "megatron_layers",
    "parallel_state",
    "runtime_engine",
]
