"""Read cases from the standard input, and print a line of JSON for each; a process of its own runs each."""

import gc
import importlib
import json
import os
import sys

import torch

from tests.support.simulated_gpu.cuda import believe_in_gpus

believe_in_gpus()  # before DeepSpeed looks for one

from parallel.axes import Group  # noqa: E402
from parallel.parameter import Shard  # noqa: E402
from parallel.seeds import initial_slice  # noqa: E402
from tests.support.simulated_gpu import Case  # noqa: E402
from tests.support.simulated_gpu.inference import infer  # noqa: E402
from tests.support.simulated_gpu.rank import run  # noqa: E402


def main() -> None:
    """Run the cases, one after another."""
    reports = os.dup(1)
    os.dup2(2, 1)  # what libraries print
    # A table that all draw from, whose numbers are read: before there are fake tensors.
    a_weight = Shard("weight", (1, 1), "replicated", init_std=1.0)
    initial_slice(a_weight, seed=0, tensor=Group(rank=0, size=1, handle=None), device=torch.device("cpu"))
    importlib.import_module("deepspeed.compile.backend")  # each engine does on a GPU, and it takes a second
    gc.freeze()  # DeepSpeed collects garbage six times
    for case in json.load(sys.stdin):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            report = (infer if Case(*case).infers else run)(Case(*case))
        except Exception as error:  # noqa: BLE001  # whatever it is, the test shows it
            report = {"error": f"{type(error).__name__}: {error}"}
        os.write(reports, (json.dumps(report) + "\n").encode())
        os._exit(0)  # autograd's thread of the GPU would not end


main()
