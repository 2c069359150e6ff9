"""The parts of `benchmarks.gpu`: each yields rows, one measured variant a row, in the order of importance."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.commands import Bench, Shape
from benchmarks.gpu_attention import attention_rows, next_token_rows, window_rows
from benchmarks.gpu_lab import Lab, Row, Variant
from benchmarks.peers import make_bloom
from configs.backends import BACKENDS
from configs.load import load_run
from configs.schema import Model, RunConfig
from parallel.groups import lone_groups, make_groups
from parallel.layout import Layout
from parallel.seeds import initial_weights
from training.build import build_engine
from training.families.table import parameter_count
from training.flops import causal_flops_per_token, flops_per_token
from training.generation import continue_tokens
from training.model.single import SingleModel, lone_decoder
from training.profiling.recording import read_recording, recording, window
from training.profiling.report import category_times
from training.sampling import Sampling
from training.utilization import peak_flops

POLL_SECONDS = 0.05


def step_rows(lab: Lab) -> Iterator[Variant]:
    """Yield a training step of the 1.36B model in each variant, through the engine."""
    sizes = lab.sizes
    length, batch = sizes.length, sizes.micro_batch
    none, sinusoidal = "model.position=none", "model.position=sinusoidal"
    off, triton, on_gpu = "train.compile=off", "train.compile=triton", lab.device.type == "cuda"
    backends = [name for name in BACKENDS if name != "reference" and lab.runs(name)]
    variants: list[tuple[str, list[str], int, int, bool]] = [
        ("default", [], length, batch, True),
        ("sinusoidal", [sinusoidal], 2 * length, batch // 2, False),
        ("none", [none], length, batch, False),
        ("default", [], length, 2 * batch, False),
        ("default", [], 2 * length, batch // 2, False),
        *(("fused by Triton", [triton], length, sequences, True) for sequences in (2 * batch, batch) if on_gpu),
        ("recompute selective", ["train.recompute=selective"], length, batch, False),
        ("compile off", [off], length, batch, True),
        ("sinusoidal", [sinusoidal], 2 * length, batch, False),
        *((name, [f"model.attention={name}"], length, batch, False) for name in backends),
        ("none", [none], 2 * length, batch // 2, False),
        ("none, compile off", [none, off], length, batch, False),
        ("default", [], 2 * length, batch, False),
    ]
    for name, keys, tokens, sequences, profiles in variants:
        overrides = [*sizes.overrides, *keys]
        measure = partial(_step, lab, "alibi-1b3", overrides, length=tokens, micro_batch=sequences, profiles=profiles)
        yield f"{name}, {sequences} x {tokens}", measure


def small_rows(lab: Lab) -> Iterator[Variant]:
    """Yield a training step of alibi-125m."""
    # Functions compiled for the large model before would serve any number of heads, at a multiple of the time.
    torch._dynamo.reset()
    length, batch = lab.sizes.length, 8 * lab.sizes.micro_batch
    measure = partial(_step, lab, "alibi-125m", lab.sizes.small, length=length, micro_batch=batch, profiles=True)
    yield f"alibi-125m, {batch} x {length}", measure


def _config(run: str, overrides: Sequence[str], *, length: int, micro_batch: int, micro_batches: int) -> RunConfig:
    keys = ["parallel.tensor=1", "parallel.pipeline=1", f"data.sequence_length={length}"]
    batch = [f"train.micro_batch={micro_batch}", f"train.global_batch={micro_batch * micro_batches}"]
    return load_run(run, overrides=[*keys, *batch, *overrides])


def _step(lab: Lab, run: str, overrides: Sequence[str], *, length: int, micro_batch: int, profiles: bool) -> Row:
    sizes = lab.sizes
    lab.forget()
    config = _config(run, overrides, length=length, micro_batch=micro_batch, micro_batches=sizes.micro_batches)
    layout, began = Layout.of(config, world_size=1), time.perf_counter()
    groups = make_groups(layout)
    engine, certificates = build_engine(
        config, layout=layout, groups=groups, vocab_size=sizes.vocab_size, device=lab.device
    )
    lab.wait()
    built = time.perf_counter() - began
    shape = (sizes.micro_batches, micro_batch, length + 1)
    batches = list(torch.randint(0, sizes.vocab_size, shape))
    if lab.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]

    def step() -> None:
        engine.train_step(batches, learning_rate=1e-5)

    began = time.perf_counter()
    step()
    lab.wait()
    first = time.perf_counter() - began
    seconds = lab.seconds(step, repeats=2)
    shares: dict[str, float] = {}
    if profiles:
        with recording(lab.device) as recorded, window(lab.device):
            step()
        parts, _ = read_recording(recorded, device=lab.device.type)
        shares = {part: round(ms, 1) for part, ms in category_times(parts, steps=1).items()}
    model, peak = config.model, peak_flops(lab.device, precision=config.train.precision)
    tokens = sizes.micro_batches * micro_batch * length / seconds
    used = [
        round(tokens * count(model, vocab_size=sizes.vocab_size, length=length) / peak, 4) if peak else None
        for count in (flops_per_token, causal_flops_per_token)
    ]
    return {
        "length": length,
        "micro_batch": micro_batch,
        "attention": certificates[0].backend,
        "step_ms": round(1000 * seconds, 1),
        "micro_batch_ms": round(1000 * seconds / sizes.micro_batches, 2),
        "tokens_per_second": round(tokens),
        "mfu": used[0],
        "mfu_causal": used[1],
        "peak_gb": lab.peak_gb(),
        "build_s": round(built, 1),
        "first_step_s": round(first, 1),
        **({"milliseconds": shares} if shares else {}),
    }


def bloom_rows(lab: Lab) -> Iterator[Variant]:
    """Yield a step of transformers' Bloom of the same shape: 16-bit weights with fp32 masters, fused AdamW."""
    for length, batch in (
        (lab.sizes.length, lab.sizes.micro_batch),
        (2 * lab.sizes.length, lab.sizes.micro_batch // 2),
    ):
        yield f"transformers Bloom, {batch} x {length}", partial(_bloom, lab, length=length, micro_batch=batch)


def _bloom(lab: Lab, *, length: int, micro_batch: int, micro_batches: int = 2) -> Row:
    lab.forget()
    sizes = lab.sizes
    model = _config("alibi-1b3", [*sizes.overrides], length=length, micro_batch=1, micro_batches=1).model
    shape = Shape(model.hidden, model.heads, model.layers, length)
    dtype = torch.bfloat16 if lab.device.type == "cuda" else torch.float32
    with lab.device:
        bloom = make_bloom(shape, vocab_size=sizes.vocab_size).to(lab.device, dtype)
    masters = [weight.detach().float().clone().requires_grad_() for weight in bloom.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def step() -> None:
        for _ in range(micro_batches):
            tokens = torch.randint(0, sizes.vocab_size, (micro_batch, length + 1), device=lab.device)
            logits = bloom(tokens[:, :-1]).logits
            (F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / micro_batches).backward()
        for weight, master in zip(bloom.parameters(), masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(bloom.parameters(), masters, strict=True):
                weight.copy_(master)

    step()
    seconds = lab.seconds(step, repeats=3)
    tokens_per_second = micro_batches * micro_batch * length / seconds
    peak = peak_flops(lab.device, precision="bf16" if lab.device.type == "cuda" else "fp32")
    flops = 6 * parameter_count(model, vocab_size=sizes.vocab_size) + 12 * model.layers * model.hidden * length
    return {
        "length": length,
        "micro_batch": micro_batch,
        "step_ms": round(1000 * seconds, 1),
        "micro_batch_ms": round(1000 * seconds / micro_batches, 2),
        "tokens_per_second": round(tokens_per_second),
        "mfu": round(tokens_per_second * flops / peak, 4) if peak else None,
        "peak_gb": lab.peak_gb(),
    }


def decoding_rows(lab: Lab) -> Iterator[Variant]:
    """Yield the time of a decoded token by the 125M model, and of its attention alone in long buffers."""
    for precision in ("fp32", "bf16") if lab.device.type == "cuda" else ("fp32",):
        yield f"alibi-125m, {precision}", partial(_decoding, lab, precision)
    yield from next_token_rows(lab)


def _decoding(lab: Lab, precision: str) -> Row:
    lab.forget()
    sizes = lab.sizes
    model: Model = load_run("alibi-125m", overrides=[*sizes.small]).model
    decoder = lone_decoder(model, vocab_size=sizes.vocab_size)
    initial_weights(decoder, seed=1, tensor=lone_groups().tensor)
    single = SingleModel(decoder, device=lab.device, certificate={}, precision=precision)
    prompt = torch.randint(3, sizes.vocab_size, (sizes.length // 2,)).tolist()
    first = 4  # those that warm up, and capture a graph
    stream = continue_tokens(single, prompt, sampling=Sampling(), end=None)
    list(islice(stream, first))
    began = time.perf_counter()
    list(islice(stream, sizes.decoded))  # each token is read by the host
    return {
        "prompt": len(prompt),
        "token_ms": round(1000 * (time.perf_counter() - began) / sizes.decoded, 2),
    }


def command_rows(lab: Lab) -> Iterator[Variant]:
    """Yield what commands take on a GPU: to the first step of alibi-1b3, and the sweep of lengths of alibi-125m."""
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        yield "train alibi-1b3 to its first step", partial(_first_step, bench, Path(home) / "start")
        yield "evaluate alibi-125m at 1024 to 65,536", partial(_sweep, bench, Path(home))


def _first_step(bench: Bench, run_dir: Path) -> Row:
    keys = [
        f"run.dir={run_dir}",
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "train.global_batch=16",
        "evaluate.every=0",
    ]
    command = bench.command("train", "alibi-1b3", keys, options=["--ranks", "1"])
    began, metrics = time.perf_counter(), run_dir / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()  # the ranks end with it: a save of this model takes longer than all else
    _, said = process.communicate()
    if not metrics.exists():
        raise RuntimeError(f"train ended before its first step: {said[-500:]}")
    seconds = json.loads(metrics.read_text().splitlines()[0])["step_seconds"]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "of_them_the_step": round(seconds, 1),
        "said": [line for line in said.splitlines() if line.endswith(" s")],
    }


def _sweep(bench: Bench, home: Path) -> Row:
    run_dir = home / "small"
    keys = [f"run.dir={run_dir}", "train.steps=1", "train.warmup_steps=0", "train.global_batch=16", "evaluate.every=0"]
    bench.call("train", "alibi-125m", keys, options=["--ranks", "1"])
    lengths = ",".join(str(1024 << power) for power in range(7))
    command = [sys.executable, "-P", "-m", "trainshort", "evaluate", str(run_dir)]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--data", str(home / "words.txt"), "--lengths", lengths],
        env=os.environ,
        check=True,
        capture_output=True,
    )
    return {"seconds": round(time.perf_counter() - began, 1)}


PARTS: dict[str, Callable[[Lab], Iterator[Variant]]] = {
    "step": step_rows,
    "attention": attention_rows,
    "windows": window_rows,
    "bloom": bloom_rows,
    "small": small_rows,
    "decoding": decoding_rows,
    "commands": command_rows,
}
