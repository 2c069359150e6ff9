"""The learning rate, utilization and metrics.jsonl."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from configs.load import load_run
from tests.support.steps import step_result
from training.flops import causal_flops_per_token, flops_per_token
from training.metrics_file import MetricsFile
from training.schedule import learning_rate
from training.utilization import measured_gemm, peak_flops


def test_learning_rate_warms_up_then_follows_the_cosine() -> None:
    overrides = ["train.learning_rate=1.0", "train.min_learning_rate=0.1", "train.warmup_steps=10"]
    train = load_run("demo", overrides=[*overrides, "train.steps=500", "train.decay_steps=110"]).train
    assert [learning_rate(step, train=train) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    for step in range(11, 111):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert learning_rate(step, train=train) == pytest.approx(expected)
    assert learning_rate(111, train=train) == learning_rate(500, train=train) == pytest.approx(0.1)


def test_flops_of_the_reference_model_are_the_published_ones() -> None:
    model = load_run("alibi-1b3").model
    assert flops_per_token(model, vocab_size=50304, length=1024) == 6 * 1_361_987_584 + 12 * 25 * 2048 * 1024
    assert causal_flops_per_token(model, vocab_size=50304, length=1024) == 6 * 1_361_987_584 + 6 * 25 * 2048 * 1024


def test_peak_of_a_cpu_is_measured() -> None:
    peak = peak_flops(torch.device("cpu"), precision="fp32")
    assert peak is not None
    assert 1e8 < peak < 1e14


def test_a_large_product_is_as_fast_as_a_linear_layer() -> None:
    x, weight = torch.ones(512, 256, dtype=torch.float16), torch.ones(256, 256, dtype=torch.float16)
    functional.linear(x, weight)
    began = time.perf_counter()
    functional.linear(x, weight)
    rate = 2 * 512 * 256 * 256 / (time.perf_counter() - began)
    assert measured_gemm(torch.device("cpu"), torch.float16) > rate / 5, "the rest is what other processes take"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        *((other, None) for other in ("NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU")),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_peak_of_a_gpu_is_of_its_own_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for half in ("bf16", "fp16"):
        assert peak_flops(torch.device("cuda"), precision=half) == peak


def test_tf32_has_half_the_peak_of_16_bits_where_there_is_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, capability, peak in (("NVIDIA A100-SXM4-80GB", (8, 0), 156e12), ("Tesla T4", (7, 5), 8.1e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert peak_flops(torch.device("cuda"), precision="tf32") == peak


def test_metrics_keep_each_step_once_over_restarts(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, last_step=0)
    for step in (1, 2, 3):
        file.on_step(step_result(step=step))
    file.close("KILLED")
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 4, "los')
    again = MetricsFile(tmp_path, last_step=2)
    again.on_step(step_result(step=3, validation_loss=1.5))
    again.close("FINISHED")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["validation_loss"] == 1.5
    assert "validation_loss" not in lines[1]
    discarded = (tmp_path / "logs" / "metrics_discarded.jsonl").read_text()
    assert discarded.count("\n") == 1
    assert discarded.endswith('{"step": 4, "los')


def test_metrics_have_the_fields_that_other_tools_read(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, last_step=0)
    file.on_step(step_result())
    file.close("FINISHED")
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text())) == [
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_seen",
        "consumed_samples",
        "step_seconds",
        "tokens_per_second",
        "model_flops_utilization",
        "model_flops_utilization_causal",
        "memory_gb",
    ]
