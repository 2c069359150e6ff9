"""The kernel that looks for tiles with weight is compiled for GPUs, which needs none: it fits their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from training.model.kernels.tile_search import NEAREST_TILES
from training.model.kernels.tile_search_triton import search

names = search.arg_names
types = dict(q="*bf16", k="*bf16", radius="*fp32", series="*fp32", first="*i32", scale="fp32", limit="fp32")
found = []
for capability, head_dim, documents in json.loads(sys.argv[1]):
    constants = dict(HEAD_DIM=head_dim, WIDTH=head_dim, TILE=128, NEAREST=NEAREST_TILES)
    if not documents:
        constants["starts"] = None
    own = {**types, "starts": "*i64", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=search,
        signature={name: own.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("q", "k", "q_place", "k_place")},
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=8, num_stages=1))
    found.append((made.metadata.shared, "mma" in made.asm["ptx"]))
print(json.dumps(found))
"""
KIB = 1024
CARDS = {90: 227 * KIB, 80: 163 * KIB}  # an H100 and an A100: shared memory of a block of threads, in bytes
CASES = [(90, 128, True), (80, 128, False), (80, 64, True)]


def test_the_search_compiles_for_gpus(tmp_path: Path) -> None:
    surroundings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (capability, *_), (shared, on_tensor_cores) in zip(CASES, json.loads(done.stdout), strict=True):
        assert 0 < shared <= CARDS[capability]
        assert on_tensor_cores
