"""A profile's parts: what each moment was spent on, the sums, the FLOPs, the tensors, and what is shown of it."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from launch.show.profile import show_profile
from parallel import fused_triton
from training.model.kernels import tile_search_triton
from training.profiling.categories import (
    ATTENTION_WORK,
    COMMUNICATION,
    ELEMENTWISE,
    HOST,
    IDLE,
    LOSS,
    MATRIX,
    OPTIMIZER,
    OTHER,
    category_of_kernel,
    category_of_operation,
)
from training.profiling.recording import allocation_tree, read_recording, recording, window
from training.profiling.report import category_times, longest_operations, product_flops, profile_document
from training.profiling.tensors import largest_tensors
from training.profiling.timeline import Interval, names_around, parts_of_cpu, parts_of_gpu

CPU = torch.device("cpu")
WINDOW = Interval("all", 0, 100)


def test_a_cpus_parts_are_the_innermost_operations() -> None:
    operations = [
        Interval("Optimizer.step#AdamW.step", 60, 80, identity=4),
        Interval("aten::linear", 10, 40, identity=1),
        Interval("aten::addmm", 15, 35, identity=2, shapes=((8,), (4, 16), (16, 8))),
        Interval("aten::copy_", 20, 25, identity=3),
        Interval("aten::gelu", 40, 50, identity=5),
        Interval("aten::add", 95, 120, identity=6),  # ends after the window
    ]
    waits = [Interval("gloo:all_reduce", 45, 55), Interval("gloo:recv", 50, 58)]
    parts = parts_of_cpu(operations, window=WINDOW, transfers=waits)
    times = category_times(parts, steps=1)
    assert {name: round(value * 1e6) for name, value in times.items()} == {
        MATRIX: 30,  # what runs inside a product, and around it in its linear layer, is part of it
        ELEMENTWISE: 10,
        OPTIMIZER: 20,
        COMMUNICATION: 8,  # from 50 to 58 the rank does nothing else
        HOST: 32,
    }
    assert product_flops(operations) == 2 * 4 * 16 * 8
    assert longest_operations(parts, steps=1)[0].name == "Optimizer.step#AdamW.step"
    assert "aten::addmm 4 x 16 x 8" in [each.name for each in longest_operations(parts, steps=1)]


def test_a_gpus_parts_count_overlap_once() -> None:
    kernels = [
        Interval("nvjet_tst_128x256", 10, 30, identity=1),
        Interval("ncclDevKernel_AllReduce", 20, 50, identity=2),  # from 30 on nothing else runs
        Interval("vectorized_elementwise_kernel", 60, 70, identity=3),
        Interval("vectorized_elementwise_kernel", 65, 75, identity=4),
        Interval("at::native::cunn_SoftMaxForward", 75, 80, identity=5),
        Interval("vectorized_elementwise_kernel", 90, 100, identity=6),
    ]
    launches = [Interval("Optimizer.step#AdamW.step", 0, 9, identity=9), Interval("aten::add_", 1, 2, identity=6)]
    parts = parts_of_gpu(kernels, window=WINDOW, paths=names_around(launches))
    times = {name: round(value * 1e6) for name, value in category_times(parts, steps=1).items()}
    assert times == {MATRIX: 20, COMMUNICATION: 20, ELEMENTWISE: 15, LOSS: 5, OPTIMIZER: 10, IDLE: 30}


@pytest.mark.parametrize(
    ("path", "category"),
    [
        (["aten::mm"], MATRIX),
        (["Torch-Compiled Region: 0/0"], ELEMENTWISE),
        (["_MeanLoss", "aten::_log_softmax"], LOSS),
        (["_MeanLoss", "aten::mm"], MATRIX),
        (["aten::scaled_dot_product_attention", "aten::empty"], ATTENTION_WORK),
        (["aten::bmm"], ATTENTION_WORK),
        (["aten::_fused_adamw_"], OPTIMIZER),
        (["c10d::allreduce_"], COMMUNICATION),
        (["autograd::engine::evaluate_function: MmBackward0"], HOST),
        (["something::else"], OTHER),
        ([], HOST),
    ],
)
def test_operations_have_categories(path: list[str], category: str) -> None:
    assert category_of_operation(path) == category


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopA_NNT", MATRIX),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128", MATRIX),
        ("triton_tem_fused_flex_attention_backward_0", ATTENTION_WORK),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", ATTENTION_WORK),
        ("void pytorch_flash::flash_fwd_kernel<...>", ATTENTION_WORK),
        ("triton_per_fused_add_native_layer_norm_0", ELEMENTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", ELEMENTWISE),
        ("multi_tensor_apply_kernel<..., FusedAdamMathFunctor>", OPTIMIZER),
        ("ncclDevKernel_ReduceScatter_Sum_bf16", COMMUNICATION),
        ("Memcpy HtoD (Pinned -> Device)", HOST),
        ("my_own_kernel", OTHER),
    ],
)
def test_kernels_have_categories(name: str, category: str) -> None:
    assert category_of_kernel(name, []) == category


@pytest.mark.parametrize(("module", "category"), [(fused_triton, ELEMENTWISE), (tile_search_triton, ATTENTION_WORK)])
def test_kernels_of_a_training_step_have_categories(module: ModuleType, category: str) -> None:
    own = {name: value.fn for name, value in vars(module).items() if hasattr(value, "fn")}
    launched = [name for name, fn in own.items() if fn.__module__ == module.__name__ and not name.startswith("_")]
    assert launched
    assert {name: category_of_kernel(name, []) for name in launched} == dict.fromkeys(launched, category)


def test_windows_of_attention_are_no_optimizers() -> None:
    norms = "triton_red_fused_amax_cummax_linalg_vector_norm_1"  # compiled: it is named after what it computes
    assert category_of_kernel(norms, ["Torch-Compiled Region: 0/0", norms]) == ELEMENTWISE
    assert category_of_operation(["Torch-Compiled Region: 0/0", "cpp_fused_linalg_vector_norm_0"]) == ELEMENTWISE
    assert category_of_kernel("search", ["trainshort::first_tiles_with_weight"]) == ATTENTION_WORK
    assert category_of_kernel("void at::native::reduce_kernel", ["aten::linalg_vector_norm"]) == OPTIMIZER


def test_a_real_recording_adds_up_and_knows_its_flops(capsys: pytest.CaptureFixture[str]) -> None:
    layer, x = nn.Linear(32, 64), torch.randn(128, 32, requires_grad=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    nn.functional.gelu(layer(x)).sum().backward()
    with recording(CPU) as recorded, window(CPU):
        nn.functional.gelu(layer(x)).sum().backward()
        optimizer.step()
    parts, operations = read_recording(recorded, device="cpu")
    assert product_flops(operations) == 3 * 2 * 128 * 32 * 64
    held = {"weight": layer.weight}
    (first, *_) = tensors = largest_tensors(allocation_tree(recorded), device="cpu", held=held)
    assert first.size * first.count >= 128 * 64 * 4
    assert {tensor.name: tensor.size for tensor in tensors if tensor.held} == {"weight": 32 * 64 * 4}
    facts = {"run": "small", "ranks": 1, "layout": "tensor 1", "precision": "fp32", "attention": "sdpa"}
    speed = {"step_seconds": 0.5, "tokens_per_second": 2048.0, "memory_gb": 1.5, "device": "cpu"}
    used = {"model_flops_utilization": 0.52, "model_flops_utilization_causal": 0.5}
    document = profile_document(
        facts={**facts, **speed, **used}, parts=parts, operations=operations, steps=1, gemm_flops_per_second=1e11
    )
    whole = sum(row["milliseconds"] for row in document["categories"])
    assert whole == pytest.approx(document["profiled_step_milliseconds"]) == sum(p.nanoseconds for p in parts) / 1e6
    assert {MATRIX, ELEMENTWISE, OPTIMIZER, HOST} <= {row["name"] for row in document["categories"]}
    show_profile({**document, "tensors": []}, out=Path("out"))
    shown = capsys.readouterr().out
    for words in (MATRIX, "100.0%", "52.0% full", "50.0% causal", "out/trace.json.gz", "ui.perfetto.dev"):
        assert words in shown
