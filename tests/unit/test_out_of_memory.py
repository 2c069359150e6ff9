"""Memory that runs out is said in words: which rank, what it held, what to change."""

import errno
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import LostPeers, TrainshortError
from configs.figures import byte_size
from configs.load import load_run
from data_pipeline import prepare
from parallel.start import ProcessRank
from tests.support.command_line import Call
from training import host_memory, out_of_memory
from training.host_memory import ADDRESS_SPACE, MemoryLimit, OomKills, host_limit, oom_kills
from training.out_of_memory import (
    OutOfMemory,
    explain_out_of_memory,
    how_it_ran_out,
    is_of_gpu,
    is_out_of_memory_text,
    memory_error,
)
from training.rank_errors import explain_rank_failure

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.2 GiB is free"
)


def raised_from(cause: Exception) -> Exception:
    """Return an error that a library raised because of another one."""
    error = RuntimeError("the compiler failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.64 TiB for an array"),
        MemoryError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(CPU_ALLOCATOR),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("unable to mmap 65536 bytes from file <x>: Cannot allocate memory (12)"),
        torch.OutOfMemoryError(CUDA),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: Failed to CUDA malloc: Cuda failure 2 'out of memory'"),
        ImportError("libx.so: cannot allocate memory"),
        raised_from(torch.OutOfMemoryError(CUDA)),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_every_library_is_understood(error: Exception) -> None:
    assert memory_error(error) in (error, error.__cause__)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        ImportError("libgomp.so: cannot allocate memory in static TLS block"),
        ImportError("libx.so: failed to map segment from shared object"),  # a file system without execution
        ValueError("out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_other_errors_are_not_taken_for_memory(error: Exception) -> None:
    assert memory_error(error) is None


def test_without_address_space_libraries_say_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory_text("can't start new thread")
    monkeypatch.setattr(out_of_memory, "host_limit", lambda: MemoryLimit(10**9, ADDRESS_SPACE))
    assert is_out_of_memory_text("can't start new thread")
    assert is_out_of_memory_text("libx.so: failed to map segment from shared object")
    assert "of address space" in how_it_ran_out(MemoryError())


def message_of(error: BaseException, *, rank: int = 3, ranks: int = 4, kind: type[Exception] = OutOfMemory) -> str:
    """Return what a rank of a run says after an error."""
    config = load_run("demo", overrides=["parallel.pipeline=1"])
    process = ProcessRank(rank=rank, world_size=ranks, local_rank=rank, rendezvous="", starter="slurm")
    with pytest.raises(kind) as seen, explain_rank_failure(config, process):
        raise error
    return str(seen.value)


def test_a_rank_says_where_how_much_and_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "host_limit", lambda: MemoryLimit(5 * 10**9, "this machine's memory"))
    first, place, held, limit, *changes = message_of(RuntimeError(CPU_ALLOCATOR)).split("\n")
    assert first == "rank 3 ran out of memory"
    assert place.startswith("  place: tensor rank 1, pipeline rank 0, data rank 1, on ")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert held == f"  held: {byte_size(peak)} of memory, and asked for 4.00 GB more"
    assert limit == "  limit: 5.00 GB, this machine's memory"
    assert changes == [
        "  to need less memory, change the first of these that you can:",
        "    train.micro_batch 8 -> 4",
        "    parallel.sequence false -> true",
        "    train.recompute false -> selective or true",
        "    parallel.zero 1 -> 2 or 3",
        "    parallel.tensor 2 -> 4",
        "    parallel.pipeline 1 -> 2",
        "  or give it more memory",
    ]


def test_a_gpu_is_named_with_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        mem_get_info=lambda: (1 * 10**9, 80 * 10**9),
        memory_reserved=lambda: 70 * 10**9,
        max_memory_allocated=lambda: 69 * 10**9,
        current_device=lambda: 1,
        get_device_name=lambda: "H100",
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    error: Any = RuntimeError(CUDA)
    assert is_of_gpu(error)
    said = message_of(error)
    assert "rank 3 ran out of GPU memory\n" in said
    assert "\n  held: 69.0 GB, and asked for 2.15 GB more\n" in said
    assert "\n  limit: 80.0 GB, of cuda:1, H100; outside of torch 9.00 GB are taken\n" in said
    assert "\n    parallel.offload none -> cpu\n" in said
    assert said.endswith("\n  or use a GPU with more memory")
    with pytest.raises(OutOfMemory) as alone, explain_out_of_memory("fewer --tokens"):
        raise error
    first, second = str(alone.value).split("\n")[-3:-1]
    assert first == "    fewer --tokens"
    assert second == '    CUDA_VISIBLE_DEVICES="", to compute on CPUs, in the memory of the machine'


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[/src/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:2: Connection reset by peer"),
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        torch.distributed.DistBackendError(
            "NCCL error: ncclRemoteError: A call failed possibly due to a network error"
        ),
    ],
    ids=["closed", "reset", "store", "nccl"],
)
def test_a_rank_that_lost_the_others_says_only_that(error: Exception) -> None:
    said = message_of(error, kind=LostPeers)
    assert said == (
        "rank 3 lost its connection to the other ranks: the cause is in the log of the rank that failed first"
    )
    assert LostPeers.exit_code not in (0, 1, 2, 3)


def nccl_error(kind: str, last: str) -> Exception:
    where = "NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled error (run with NCCL_DEBUG=INFO), NCCL version 2.28.9"
    return torch.distributed.DistBackendError(f"{where}\n{kind}: It failed. \nLast error:\n{last}")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (nccl_error("ncclSystemError", "shm_open: No space left on device (28)\n"), ": shm_open: No space left .*"),
        (nccl_error("ncclUnhandledCudaError", "Cuda failure 801 'not supported'"), ": Cuda failure 801 .*"),
        (nccl_error("ncclInternalError", ""), ""),
    ],
)
def test_nccl_says_what_is_wrong_with_a_machine(error: Exception, why: str) -> None:
    assert re.fullmatch(
        rf"rank 3 cannot exchange data with the others \(nccl\w+Error{why}\): repair .*",
        message_of(error, kind=TrainshortError),
    )


@pytest.mark.parametrize(
    "why",
    [
        "The client socket has timed out after 1800000ms while trying to connect to (node1, 12345)",
        "Timed out after 1801 seconds waiting for clients. 1/2 clients joined",
    ],
)
def test_ranks_that_do_not_meet_say_why(why: str) -> None:
    said = message_of(torch.distributed.DistNetworkError(f"{why}."), kind=TrainshortError)
    assert said.startswith(f"rank 3 cannot exchange data with the others ({why}): repair what this names; ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        nccl_error("ncclInvalidUsage", "a tensor of the CPU"),
        nccl_error("ncclUnhandledCudaError", "Cuda failure 700 'an illegal memory access was encountered'"),
    ],
)
def test_other_errors_of_a_rank_stay_as_they_are(error: Exception) -> None:
    assert message_of(error, kind=type(error)) == str(error)


def test_a_command_says_it_in_words(folder: Path, trainshort: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 1.50 GiB for an array with shape (3,)")

    monkeypatch.setattr(prepare, "prepare_data", fail)
    answer = trainshort("prepare", "run.yaml")
    assert (answer.code, answer.out) == (3, "")
    first, held, _, _, *remedies = answer.error.splitlines()
    assert first == "error: this command ran out of memory"
    assert re.fullmatch(r"  held: \d.* [MG]B of memory, and asked for 1.61 GB more", held)
    assert remedies[0] == "    data.sources in smaller files"
    assert remedies[-1] == "  or give it more memory"


def test_the_smallest_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemFree: 1 kB\nMemTotal: 1000 kB\n")
    monkeypatch.setattr(host_memory, "PROC", proc)
    monkeypatch.setattr(host_memory, "CGROUPS", groups)
    assert host_limit() == MemoryLimit(1_024_000, "this machine's memory")
    assert oom_kills() == OomKills(None, None)

    job = groups / "memory" / "jobs" / "7"  # version 1
    job.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/jobs/7\n0::/\n")
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (job.parent / "memory.limit_in_bytes").write_text("500000\n")
    (job / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert host_limit().size == 500_000
    assert oom_kills() == OomKills(2, 2)

    service = groups / "a.slice"  # version 2
    service.mkdir()
    (proc / "self" / "cgroup").write_text("0::/a.slice\n")
    (service / "memory.max").write_text("max\n")
    (service / "memory.events").write_text("low 0\noom 3\noom_kill 3\n")
    assert host_limit().size == 1_024_000
    (service / "memory.max").write_text("400000\n")
    assert host_limit().size == 400_000
    (proc / "vmstat").write_text("nr_free 5\noom_kill 10\n")
    assert oom_kills() == OomKills(3, 13)
    (groups / "memory.events").write_text("oom_kill 4\n")  # of all that runs here
    assert oom_kills() == OomKills(3, 17)
