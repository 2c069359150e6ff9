"""Run ranks of a GPU job without a GPU: their tensors say that they lie on one, and hold nothing.

torch's fake tensors compute shapes, types and devices; its fake process group answers at once. What is seen: operations
on tensors of two devices, collectives of tensors that are not on the GPU, where the host waits for the GPU, and how
much memory is held. What is not: numbers, kernels and NCCL.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import environment


class Case(NamedTuple):
    """A rank of a job.

    Attributes:
        overrides: Changes to the run file alibi-1b3-80gb.
        rank, world_size: Which rank, of how many.
        infers: Whether it evaluates and decodes, instead of training.
    """

    overrides: Sequence[str]
    rank: int = 0
    world_size: int = 1
    infers: bool = False


def simulate(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Run ranks, and return what was seen.

    A rank that trains takes two steps, validates and computes logits; before that its positions are checked.

    Returns:
        Of each case, either `error`, or: `attention`, the kernel with which its positions were found right; `waits`,
        what the host waited for in the second step, and where; `off_device`, the collectives of tensors that are not
        on the GPU; `peak`, the most bytes that both steps held; and `estimate`, what `check --memory` says of it,
        without overhead. Where it infers, `waits` has those of each kind of call, and there is no memory.
    """
    torch_folder = Path(next(iter(find_spec("torch").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        compile_device = [
            "g++",
            "-O1",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{torch_folder / 'include'}",
            "-o",
            library,
        ]
        links = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*compile_device, Path(__file__).with_name("device.cpp"), *links], check=True)
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "tests.support.simulated_gpu"],
            input=json.dumps(cases),
            env=environment(
                LD_PRELOAD=str(library),
                LD_LIBRARY_PATH=str(torch_folder / "lib"),
                DS_ACCELERATOR="cuda",  # this process may have told DeepSpeed that there is no GPU
            ),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [json.loads(line) for line in ended.stdout.splitlines()]
