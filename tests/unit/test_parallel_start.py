"""Find a process's rank from the environment variables that its starter set."""

import os
import threading

import pytest
import torch
import torch.distributed as dist

from configs.errors import InputError, MachineError
from parallel.start import (
    COLLECTIVE_TIMEOUT,
    ProcessRank,
    choose_gpu,
    find_process_rank,
    open_gpu_early,
    quiet_libraries,
    start,
    start_alone,
)

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "40123",
    "SLURM_STEP_NODELIST": "gpu-[007-009,012]",
}


def test_a_shell_a_batch_script_and_one_task_are_no_rank() -> None:
    assert find_process_rank({}) is None
    assert find_process_rank({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert find_process_rank({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_srun_torchrun_and_the_local_launcher_make_ranks() -> None:
    assert find_process_rank(SRUN) == ProcessRank(5, 8, 1, "tcp://gpu-007:20123", "slurm")
    batch = {**SRUN, "MASTER_ADDR": "node3", "MASTER_PORT": "12345"}
    assert find_process_rank(batch) == ProcessRank(5, 8, 1, "tcp://node3:12345", "slurm")
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert find_process_rank(torchrun) == ProcessRank(3, 4, 1, "env://", "torchrun")
    local = {"TRAINSHORT_RANK": "1", "TRAINSHORT_RANKS": "2", "TRAINSHORT_RENDEZVOUS": "/tmp/meet"}
    assert find_process_rank(local) == ProcessRank(1, 2, 1, "file:///tmp/meet", "local")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("n[3-4]", "n3"),
        ("n[01,05],m", "n01"),
        ("rack[1-2]-node[01-04]", "rack1-node01"),
        ("node[1-2,7]-ib", "node1-ib"),
        ("node[09-11].cluster.local,x[1-2]", "node09.cluster.local"),
        ("a[1,3]b[2-3]c[007].d-e,f", "a1b2c007.d-e"),
        ("gpu_n-1.b,gpu[1-2]", "gpu_n-1.b"),
    ],
)
def test_ranks_of_srun_meet_on_the_first_node(nodes: str, first: str) -> None:
    found = find_process_rank({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.rendezvous == f"tcp://{first}:20123"


@pytest.mark.parametrize(
    "broken",
    [
        {"SLURM_LOCALID": "one"},
        {"MASTER_PORT": "http"},
        *({"SLURM_STEP_NODELIST": nodes} for nodes in ("", ",a", "n[1-2", "n1-2]", "n[]", "n[-2]", "a b", "n[[1]]")),
    ],
)
def test_a_broken_environment_is_named(broken: dict[str, str]) -> None:
    with pytest.raises(MachineError, match=r"environment is incomplete .*: start the ranks with") as error:
        find_process_rank({**SRUN, **broken})
    assert len(str(error.value).splitlines()) == 1


def test_fields_that_a_rank_does_not_need_are_not_read() -> None:
    rest = {"SLURM_JOB_ID": "123_4", "SLURM_STEP_NODELIST": "n[", "MASTER_ADDR": "node3", "MASTER_PORT": "1"}
    assert find_process_rank({**SRUN, **rest}) == ProcessRank(5, 8, 1, "tcp://node3:1", "slurm")
    assert find_process_rank({"SLURM_STEP_NUM_TASKS": "no number"}) is None


def place(local_rank: int, starter: str, *, world_size: int = 8) -> ProcessRank:
    return ProcessRank(local_rank, world_size, local_rank, "env://", starter)


@pytest.mark.parametrize(
    ("local_rank", "visible", "starter", "index"),
    [
        (5, 0, "slurm", None),
        (0, 1, "local", 0),
        (3, 4, "local", 3),
        (3, 1, "slurm", 0),  # srun --gpus-per-task=1
        (7, 1, "torchrun", 0),  # a wrapper that shows each rank one
        (1, 2, "slurm", 1),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number(local_rank: int, visible: int, starter: str, index: int | None) -> None:
    assert choose_gpu(place(local_rank, starter), visible=visible) == index


@pytest.mark.parametrize(("local_rank", "visible", "starter"), [(4, 4, "slurm"), (5, 2, "torchrun"), (1, 1, "local")])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: int, starter: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(InputError, match=rf"local rank {local_rank}, .* see {visible}: start at most {visible} ranks"):
        start(place(local_rank, starter))


@pytest.mark.parametrize(("visible", "opened"), [(0, []), (4, [2]), (2, [])])
def test_a_gpu_is_opened_early_and_errors_wait(
    monkeypatch: pytest.MonkeyPatch, visible: int, opened: list[int]
) -> None:
    asked: list[int] = []

    def set_device(index: int) -> None:
        asked.append(index)
        raise RuntimeError("CUDA error: out of memory")  # `start` will say it

    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    open_gpu_early(place(2, "local"), tensor=1)
    for thread in threading.enumerate():
        if thread.name == "opening the GPU":
            thread.join(60)
    assert asked == opened


@pytest.mark.parametrize(("tensor", "given", "used"), [(1, None, None), (2, None, "1"), (2, "8", "8")])
def test_tensor_ranks_order_the_kernels_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tensor: int, given: str | None, used: str | None
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")  # restored, whatever happens to it
    if given is None:
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    open_gpu_early(place(0, "local"), tensor=tensor)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == used


@pytest.mark.parametrize(("given", "used"), [(None, "false"), ("true", "true")])
def test_stages_on_gpus_send_without_a_warning(monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    name = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
    monkeypatch.setenv(name, given or "")  # restored, whatever happens to it
    if given is None:
        del os.environ[name]
    quiet_libraries()
    assert os.environ[name] == used


def test_a_gpu_that_two_ranks_share_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise dist.DistBackendError("NCCL error\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on 1b000")

    monkeypatch.setenv("LOCAL_RANK", "unset")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(InputError, match=r"^local rank 3, .* shares its GPU with another rank \(it sees 1\): "):
        start(place(3, "slurm"))


@pytest.mark.parametrize(("visible", "index"), [(1, "0"), (4, "2")])
def test_deepspeed_is_given_the_index_of_a_visible_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: int, index: str
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setenv("LOCAL_RANK", "unset")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: asked.update(rest, backend=backend))
    device = start(ProcessRank(rank=6, world_size=8, local_rank=2, rendezvous="env://", starter="torchrun"))
    assert os.environ["LOCAL_RANK"] == index
    assert asked["backend"] == "nccl"
    assert asked["timeout"] == COLLECTIVE_TIMEOUT
    assert device == asked["device_id"] == torch.device("cuda", int(index))
    start(place(0, "local", world_size=1))
    assert asked["device_id"] is None, "one rank connects to nobody"


def test_a_rank_flushes_denormals() -> None:
    torch.set_flush_denormal(False)
    start_alone()
    assert float(torch.full((64,), 1e-30).mul(1e-10).sum()) == 0.0
