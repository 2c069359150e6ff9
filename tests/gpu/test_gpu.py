"""Tests that need a GPU: `make test-gpu`; those marked slow run in `make test-gpu-full` alone.

Compiling a kernel takes longer than all else: a test takes all lengths that one compilation serves.
"""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.backends import BACKENDS, installed_packages, unavailable, unsupported
from configs.positions import POSITIONS
from configs.precisions import PRECISIONS
from configs.schema import Model
from parallel.groups import lone_groups
from tests.support.data import BOOK
from tests.support.house.source import HOUSE
from tests.support.models import LAYERS, VOCABULARY, make_decoder, make_wandering_decoder
from tests.support.small_run import ONE_RANK, overrides_of, set_options, small_run
from training.generation import continue_tokens
from training.model.attention import make_attention
from training.model.kernels.reference import Reference
from training.model.positions.alibi import slopes
from training.model.positions.bias import SlopeBias
from training.model.proof.attention_weights import dtype_of
from training.model.proof.audit import audit
from training.model.proof.certificate import certify
from training.model.single import SingleModel
from training.profiling.categories import ATTENTION_WORK, ELEMENTWISE, MATRIX, OPTIMIZER, OTHER
from training.rollbacks import read_rollbacks
from training.sampling import Sampling

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LIMITS = {dtype_of(name): row.row_tolerance for name, row in PRECISIONS.items() if not row.gpu_only}


# The backends that this machine can run: flash-attn is an extra, and has no fp32.
CASES = [
    (name, dtype, tolerance)
    for name in BACKENDS
    for precision, dtype, tolerance in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 3e-2))
    if unsupported(BACKENDS[name], position="alibi", precision=precision, head_dim=128) is None
    and unavailable(BACKENDS[name], device="cuda", packages=installed_packages()) is None
]
# Triton takes most of a minute to compile a kernel in fp32: in the core, one test does.
QUICK = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] if BACKENDS[name].compiles and dtype == torch.float32 else [])
    for name, dtype, _ in CASES
]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("lengths", [(1001,), pytest.param((64, 192, 1024, 2112), marks=pytest.mark.slow)])
def test_a_backend_equals_the_reference_with_gradients(
    backend: str, dtype: torch.dtype, tolerance: float, lengths: tuple[int, ...]
) -> None:
    strip = SlopeBias(torch.tensor(slopes(16), dtype=torch.float64))
    strip(rows=2, keys=4096, device=CUDA, dtype=dtype)  # longer than the calls need
    attend = make_attention(backend, strip)
    for length in lengths:
        torch.manual_seed(0)
        shape = (1, 16, length, 128)
        exact = [torch.randn(shape, device="cuda", dtype=dtype).double().requires_grad_() for _ in range(3)]
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
        weight = torch.randn(shape, device="cuda", dtype=torch.float64)
        expected, found = Reference(SlopeBias(strip.local_slopes))(*exact), attend(q, k, v)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
        (expected * weight).sum().backward()
        (found.double() * weight).sum().backward()
        for x, y in zip((q, k, v), exact, strict=True):
            assert x.grad is not None
            assert y.grad is not None
            torch.testing.assert_close(x.grad.double(), y.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("heads", [16, pytest.param(112, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("backend", "dtype"), QUICK)
def test_rows_are_within_the_limit(backend: str, dtype: torch.dtype, heads: int) -> None:
    for length in (1024, 4096) if heads == 16 else (1024, 4096, 16384):
        found = audit(backend, slopes=slopes(heads), head_dim=128, length=length, dtype=dtype, device=CUDA)
        assert found.worst.measured.worst <= LIMITS[dtype], found.worst


@pytest.mark.parametrize("position", POSITIONS)
def test_a_step_of_every_position_method_equals_the_cpus(position: str) -> None:
    decoders = {
        device: make_decoder(4, head_dim=16, position=position, backend="auto").to(device) for device in ("cpu", "cuda")
    }
    tokens = torch.randint(0, VOCABULARY, (2, 301), generator=torch.Generator().manual_seed(0))
    found = []
    for device, decoder in decoders.items():
        logits = decoder(tokens[:, :-1].to(device))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(device)).backward()
        found.append([logits.cpu(), *(p.grad.cpu() for p in decoder.parameters() if p.grad is not None)])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("position", "precision"),
    [
        *((position, "bf16") for position in POSITIONS),
        *(
            pytest.param(row.name, "fp32", marks=[pytest.mark.slow] * (row.bias != "table"))
            for row in POSITIONS.values()
        ),
        pytest.param("alibi", "fp16", marks=pytest.mark.slow),
    ],
)
def test_every_position_method_is_certified(position: str, precision: str) -> None:
    decoder = make_decoder(8, head_dim=64, position=position, backend="auto").to(CUDA)
    model = Model(layers=LAYERS, hidden=512, heads=8, position=position)
    (found,) = certify(decoder, model, groups=lone_groups(), precision=precision, device=CUDA)
    limit = PRECISIONS[precision].row_tolerance
    assert (found.device, found.error <= limit) == ("cuda", True), found


@pytest.mark.parametrize(("backend", "dtype"), [case for case in QUICK if case.values[0] != "reference"])
@pytest.mark.parametrize(
    "length", [pytest.param(4096, marks=pytest.mark.slow), 4001]
)  # 4001: kernels cannot read such rows of a mask directly
def test_twice_the_length_takes_twice_the_memory(backend: str, dtype: torch.dtype, length: int) -> None:
    peaks = []
    for keys in (length, 2 * length):
        attend = make_attention(backend, SlopeBias(torch.tensor(slopes(16), dtype=torch.float64)))
        q, k, v = (torch.randn(1, 16, keys, 128, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0], peaks


@pytest.mark.parametrize("position", POSITIONS)
def test_greedy_tokens_are_those_of_the_cpu(position: str) -> None:
    prompt = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for device in ("cpu", "cuda"):
        model = SingleModel(make_wandering_decoder(position=position), device=torch.device(device), certificate={})
        found.append(list(islice(continue_tokens(model, prompt, sampling=Sampling(), end=None), 60)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "precision", ["bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in PRECISIONS if name != "bf16")]
)
def test_a_run_trains_and_evaluates_on_one_gpu(tmp_path: Path, precision: str) -> None:
    overrides = one_gpu_run(tmp_path, precision)
    for command in ("prepare", "train"):
        call(command, "demo", *overrides)
    call("evaluate", str(tmp_path / "run"))
    assert (tmp_path / "run" / "evaluation" / "report.json").is_file()


@pytest.mark.slow
def test_a_branch_on_a_gpu_goes_back_once_and_stops(tmp_path: Path) -> None:
    trunk = [*one_gpu_run(tmp_path, "bf16"), *set_options(["train.schedule=constant", "train.steps=2"])]
    for command in ("prepare", "train"):
        call(command, "demo", *trunk)
    own = [
        f"run.dir={tmp_path / 'branch'}",
        f"data.dir={tmp_path / 'run' / 'data'}",
        f"train.branch_from={tmp_path / 'run'}",
    ]
    diverging = set_options([*own, "train.steps=6", "train.learning_rate=1e30", "train.rollbacks=1"])
    command = [sys.executable, "-P", "-m", "trainshort", "train", "demo", *trunk, *diverging]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("ROLLED BACK (1 of 1)")) == (2, 1), ended.stderr
    assert "so training has diverged again, after 1 rollback: `trainshort train" in ended.stderr
    (rollback,) = read_rollbacks(tmp_path / "branch")
    assert rollback.step == 2


def test_a_profile_on_a_gpu_adds_up(tmp_path: Path) -> None:
    overrides = one_gpu_run(tmp_path, "bf16")
    call("prepare", "demo", *overrides)
    document = json.loads(call("profile", "demo", "--json", *overrides))
    times = {row["name"]: row["milliseconds"] for row in document["categories"]}
    assert sum(times.values()) == pytest.approx(document["profiled_step_milliseconds"])
    assert {MATRIX, ATTENTION_WORK, OPTIMIZER, ELEMENTWISE} <= set(times)
    assert times.get(OTHER, 0) < 0.05 * document["profiled_step_milliseconds"]
    assert document["matrix_products"]["flops_per_second"] > 0
    assert document["tensors"]


def test_no_step_waits_for_the_gpu() -> None:
    """A process of its own: the ranks of the other tests have met by gloo, which waits."""
    places = [str(HOUSE), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may be there
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-P", "-m", "tests.gpu.watched_step"], check=True, env=environment)


def one_gpu_run(folder: Path, precision: str) -> list[str]:
    """Return the options of a small run on a text in the folder."""
    (folder / "book.txt").write_text(BOOK, encoding="utf-8")
    keys = {"data": {"sources": [str(folder / "book.txt")]}, "run": {"dir": str(folder / "run")}}
    shape = {"model": {"hidden": 128, "heads": 4}, "train": {"precision": precision}}
    return set_options(overrides_of(small_run(ONE_RANK, keys, shape)))


def call(*arguments: str) -> str:
    """Run a command, and return what it writes."""
    command = [sys.executable, "-P", "-m", "trainshort", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
