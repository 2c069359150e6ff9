"""Find a process's rank from the environment variables that its starter set."""

import os

import pytest
import torch
import torch.distributed as dist

from configs.errors import MachineError
from parallel.start import ProcessRank, find_process_rank, start, start_alone

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


@pytest.mark.parametrize(("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[3-4]", "n3"), ("n[01,05],m", "n01")])
def test_ranks_of_srun_meet_on_the_first_node(nodes: str, first: str) -> None:
    place = find_process_rank({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert place is not None
    assert place.rendezvous == f"tcp://{first}:20123"


@pytest.mark.parametrize("broken", [{"SLURM_LOCALID": "one"}, {"SLURM_STEP_NODELIST": ""}])
def test_a_broken_environment_is_named(broken: dict[str, str]) -> None:
    with pytest.raises(MachineError, match=r"environment is incomplete .*: start the ranks with"):
        find_process_rank({**SRUN, **broken})


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
    assert device == asked["device_id"] == torch.device("cuda", int(index))


def test_a_rank_flushes_denormals() -> None:
    torch.set_flush_denormal(False)
    start_alone()
    assert float(torch.full((64,), 1e-30).mul(1e-10).sum()) == 0.0
