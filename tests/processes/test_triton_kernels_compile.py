"""Triton's kernels are compiled for GPUs, which needs none: they fit their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from parallel import fused_triton
from training.model.kernels import next_token_triton, tile_search_triton
from training.model.kernels.next_token import NEAREST_KEYS
from training.model.kernels.tile_search import NEAREST_TILES

def compiled(kernel, capability, types, constants, aligned, **options):
    names = kernel.arg_names
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    # 16 bytes a thread, not elements one by one
    return made.metadata.shared, "mma" in ptx, "max.NaN" in ptx, "ld.global.v4" in ptx and "st.global.b16" not in ptx

def search(capability, head_dim, dtype, lacks):
    types = dict(q="*" + dtype, k="*" + dtype, radius="*fp32", series="*fp32", starts="*i64", first="*i32")
    constants = dict(HEAD_DIM=head_dim, WIDTH=head_dim, TILE=128, NEAREST=NEAREST_TILES, **dict.fromkeys(lacks))
    types |= dict(scale="fp32", limit="fp32")
    aligned = ("q", "k", "q_place", "k_place")
    return compiled(tile_search_triton.search, capability, types, constants, aligned, num_warps=8, num_stages=1)

def part(capability, head_dim, dtype, lacks):
    types = dict.fromkeys(("q", "keys", "values"), "*" + dtype)
    types |= dict.fromkeys(("radius", "series", "parts", "sums"), "*fp32") | dict(position="*i64")
    types |= dict(scale="fp32", limit="fp32")
    constants = dict(HEAD_DIM=head_dim, WIDTH=128, TILE=64, NEAREST=NEAREST_KEYS, **dict.fromkeys(lacks))
    strides = [f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "head", "place")]
    aligned = ["q", "keys", "values", "parts", *(stride for stride in strides if stride != "q_place")]
    return compiled(next_token_triton.attend_part, capability, types, constants, aligned)

def join(capability, head_dim, dtype, lacks):
    types, constants = dict(parts="*fp32", sums="*fp32", out="*" + dtype), dict(HEAD_DIM=head_dim, WIDTH=128, COUNT=64)
    return compiled(next_token_triton.join_parts, capability, types, constants, ("parts", "out"))

def fused(capability, head_dim, dtype, lacks, name, options, warps):
    kernel = getattr(fused_triton, name)
    numbers, floats = ("rows", "each", "width", "heads", "head_dim", "epsilon"), ("moments", "sums")
    options = {"WIDTH": head_dim, **options} if "WIDTH" in kernel.arg_names else options
    tensors = [name for name in kernel.arg_names if name not in (*numbers, *options, *lacks)]
    types = {name: "*fp32" if name in floats else "*" + dtype for name in tensors} | dict(epsilon="fp32")
    aligned = [*tensors, *(name for name in ("width", "heads", "head_dim") if name in kernel.arg_names)]
    return compiled(kernel, capability, types, {**options, **dict.fromkeys(lacks)}, aligned, num_warps=warps)

print(json.dumps([globals()[name](*case) for name, *case in json.loads(sys.argv[1])]))
"""
KIB = 1024
# a B200, an H100 and an A100: shared memory of a block of threads, in bytes
CARDS = {100: 227 * KIB, 90: 227 * KIB, 80: 163 * KIB}
TILE = {"ROWS": 8, "COLUMNS": 256}
CASES: list[tuple[Any, ...]] = [
    ("search", 100, 128, "bf16", []),
    ("search", 90, 128, "bf16", []),
    ("search", 80, 128, "bf16", ["starts"]),
    ("search", 80, 64, "bf16", []),
    ("part", 100, 128, "bf16", []),
    ("part", 90, 128, "bf16", []),
    ("part", 90, 80, "fp32", ["radius"]),
    ("part", 80, 128, "fp32", []),
    ("join", 90, 128, "bf16", []),
    ("join", 80, 80, "fp32", []),
    ("fused", 90, 2048, "bf16", [], "norm_forward", {}, 4),
    ("fused", 80, 2048, "bf16", ["output", "output_bias", "bias"], "norm_forward", {}, 4),
    ("fused", 90, 2048, "bf16", [], "norm_backward", {"SUMS": 3}, 8),
    ("fused", 80, 8192, "bf16", ["kept"], "norm_backward", {"SUMS": 1}, 32),
    ("fused", 90, 0, "bf16", [], "residual_forward", TILE, 4),
    ("fused", 90, 0, "bf16", [], "column_sums", TILE, 4),
    ("fused", 90, 0, "bf16", [], "gelu_forward", {**TILE, "EXACT": True}, 4),
    ("fused", 90, 0, "bf16", [], "gelu_backward", {**TILE, "EXACT": False}, 4),
    ("fused", 80, 0, "bf16", ["bias", "sums"], "gelu_backward", {**TILE, "EXACT": True}, 4),
    ("fused", 90, 0, "bf16", [], "swiglu_forward", TILE, 4),
    ("fused", 80, 0, "bf16", [], "swiglu_backward", TILE, 4),
    ("fused", 90, 128, "bf16", [], "heads_forward", {"ROWS": 8}, 4),
    ("fused", 90, 128, "bf16", [], "heads_backward", {"ROWS": 8}, 4),
]


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    surroundings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (kernel, capability, _, _, lacks, *_), made in zip(CASES, json.loads(done.stdout), strict=True):
        shared, on_tensor_cores, keeps_nan, moves_16_bytes = made
        assert shared <= CARDS[capability]
        assert shared > 0 or kernel == "fused"
        assert moves_16_bytes or kernel != "fused"
        assert on_tensor_cores == (kernel == "search")
        assert keeps_nan == (kernel == "part" and "radius" not in lacks), "the largest norm, which may be nan"
