"""Profile a few steps of a run on all of its ranks; rank 0 records. The steps are those of the trainer."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile

from configs.figures import counted
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from data_pipeline.reading_ahead import ReadStep, reading_ahead
from parallel.collectives import broadcast_from_first
from parallel.groups import make_groups
from parallel.start import ProcessRank, start, stop
from training.build import build_engine
from training.folder import claim_run_folder, device_name, report_write_errors
from training.preflight import make_ready
from training.profiling.recording import allocation_tree, read_recording, recording, window
from training.profiling.report import PROFILE_NAME, TRACE_NAME, profile_document
from training.profiling.tensors import largest_tensors
from training.stopping import StopRequest
from training.trainer import TakenStep, Trainer, build_trainer
from training.utilization import measured_gemm
from training.versions import installed_version

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
_NEVER = 1 << 40  # steps between two saves


def profile_rank(config: RunConfig, process: ProcessRank, *, steps: int, out: Path) -> None:
    """Warm up, time some steps, and profile the same number; rank 0 writes the report and the trace.

    Args:
        config: The run; its folder is a scratch one.
        process: This process among the ranks.
        steps: Steps to time, and steps to profile.
        out: Folder of the report and the trace, which exists.
    Raises:
        InputError: the data do not fit the run.
        MachineError: a folder cannot be written.
    """
    say = logger.info if process.rank == 0 else logger.debug
    ready = make_ready(config, world_size=process.world_size, device="cuda" if torch.cuda.is_available() else "cpu")
    config, layout = ready.config, ready.layout
    device, groups = start(process), make_groups(layout)
    fence = broadcast_from_first(lambda: claim_run_folder(config, layout=layout, device=device), group=groups.world)
    say("building the model")
    engine, certificates = build_engine(
        config, layout=layout, groups=groups, vocab_size=ready.prepared.vocab_size, device=device
    )
    logging.getLogger("training.resume").setLevel(logging.WARNING)  # that the scratch folder has no checkpoint
    trainer = build_trainer(
        ready, engine=engine, groups=groups, fence=fence, device=device, stop=StopRequest(), resumes=False
    )
    with reading_ahead(trainer.loader, device=device) as read_step:
        say("warming up: %s", counted(WARM_UP_STEPS, "step"))
        trainer, _ = _take(trainer, WARM_UP_STEPS, read_step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        say("timing %s", counted(steps, "step"))
        trainer, timed_steps = _take(trainer, steps, read_step)
        say("profiling %s", counted(steps, "step"))
        with recording(device) if process.rank == 0 else nullcontext() as recorded:
            _take(trainer, steps, read_step)
    dist.barrier()  # CPU ranks share cores: measure at the same time
    gemm = measured_gemm(device, getattr(torch, PRECISIONS[config.train.precision].dtype))
    if recorded is not None:
        facts = _facts(trainer, timed_steps, attention=certificates[0].backend, layout=str(layout))
        say("reading the profile")
        document = _document(recorded, trainer, facts=facts, steps=steps, gemm=gemm)
        with report_write_errors(out):
            recorded.export_chrome_trace(str(out / TRACE_NAME))
            (out / PROFILE_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    stop()


def _take(trainer: Trainer, steps: int, read_step: ReadStep) -> tuple[Trainer, list[TakenStep]]:
    """Take steps, and return the trainer of those that follow."""
    config = trainer.config
    full = {"batch_warmup": (), "length_warmup": ()}
    train = config.train.model_copy(update={"steps": trainer.start.step + steps, **full})
    checkpoint = config.checkpoint.model_copy(update={"every": _NEVER})
    trainer = replace(trainer, config=config.model_copy(update={"train": train, "checkpoint": checkpoint}))
    with window(trainer.device):
        taken = list(trainer.steps(read_step))
    return replace(trainer, start=taken[-1].after), taken


def _facts(trainer: Trainer, taken: Sequence[TakenStep], *, attention: str, layout: str) -> dict[str, Any]:
    config, seconds = trainer.config, median(step.figures.seconds for step in taken)
    train = config.train
    tokens_per_second = train.global_batch * config.data.sequence_length / seconds
    full, causal = trainer.utilization.of(tokens_per_second, length=config.data.sequence_length)
    return {
        "run": config.run.name,
        "device": device_name(trainer.device),
        "ranks": trainer.groups.world.size,
        "layout": layout,
        "precision": train.precision,
        "attention": attention,
        "threads": torch.get_num_threads(),
        "torch": installed_version("torch"),
        "sequence_length": config.data.sequence_length,
        "micro_batch": train.micro_batch,
        "global_batch": train.global_batch,
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "model_flops_utilization": full,
        "model_flops_utilization_causal": causal,
        "memory_gb": max(step.figures.memory_gb for step in taken),
    }


def _document(recorded: profile, trainer: Trainer, *, facts: dict[str, Any], steps: int, gemm: float) -> dict[str, Any]:
    kind = trainer.device.type
    parts, operations = read_recording(recorded, device=kind)
    parameters = {name: parameter for name, (parameter, _) in trainer.engine.state().parameters.items()}
    largest = largest_tensors(allocation_tree(recorded), device=kind, held=parameters)
    return {
        **profile_document(facts=facts, parts=parts, operations=operations, steps=steps, gemm_flops_per_second=gemm),
        "tensors": [asdict(tensor) for tensor in largest],
    }
