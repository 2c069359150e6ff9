"""Build a run's engine on this rank: the model, its initial weights, the certificate of its positions."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from configs.choices import FAMILIES
from configs.errors import MachineError
from configs.figures import duration
from configs.precisions import PRECISIONS
from configs.schema import RunConfig
from configs.slow_parts import timed
from parallel.axes import Groups
from parallel.collectives import all_gather_object
from parallel.compiled import compile_now, compiling_fault, make_compile
from parallel.deepspeed_engine import layer_placer, make_engine
from parallel.engine import Engine
from parallel.fused import ACTIVATIONS
from parallel.head import Compile, as_it_is
from parallel.layout import Layout, head_blocks, stage_bounds
from parallel.pipeline import StagedModule
from parallel.seeds import initial_weights
from training.families.description import Family
from training.folder import record_certificate, report_write_errors
from training.model.decoder import Decoder, plan_layers
from training.model.proof.attention_weights import dtype_of
from training.model.proof.certificate import Certificate, WrongPositions, certificates_to_json, certify
from training.model.proof.kernel_error import batches_of_training
from training.preflight import Ready

logger = logging.getLogger(__name__)


def build_engine(
    config: RunConfig, *, layout: Layout, groups: Groups, vocab_size: int, device: torch.device, draws: bool = True
) -> tuple[Engine, list[Certificate]]:
    """Return the engine of a run on this rank and all ranks' certificates.

    Args:
        config: The run.
        layout: How the ranks are split into axes.
        groups: Their process groups.
        vocab_size: Tokens, without padding.
        device: This rank's device.
        draws: Whether to draw the run's initial weights; not if others will be loaded.
    Raises:
        WrongPositions: a rank's positions are wrong; raised on every rank.
    """
    train, seed = config.train, config.run.seed
    torch.set_float32_matmul_precision(PRECISIONS[train.precision].fp32_products)
    say = logger.info if groups.world.rank == 0 else logger.debug
    compiled = _compile(config, groups=groups, device=device, say=say)
    plan = plan_layers(
        config.model,
        vocab_size=vocab_size,
        tensor=groups.tensor,
        recompute=train.recompute,
        sequence=config.parallel.sequence,
        documents=config.data.mask_documents,
        z_loss=train.z_loss,
        compiled=compiled,
    )
    if plan.shared is not None:  # a position table: the certificate needs its weights
        plan.shared.to(device, dtype_of(train.precision))
        initial_weights(plan.shared, seed=seed, tensor=groups.tensor)
    with timed("built the layers", say=say):
        plan = plan.placed(layer_placer(train=train, layout=layout, groups=groups, device=device))
    head = head_blocks(config.model, vocab_size=vocab_size, length=config.data.sequence_length)
    bounds = stage_bounds(config.model.layers, stages=layout.pipeline, head=head)
    module: nn.Module = StagedModule(plan, groups=groups, bounds=bounds) if layout.pipeline > 1 else Decoder(plan)
    with timed("checked the positions", say=say):
        certificates = certify(
            module,
            config.model,
            groups=groups,
            precision=train.precision,
            device=device,
            documents=config.data.mask_documents,
            batches=batches_of_training(config, apart=compiled is not as_it_is),
        )
    engine = make_engine(module, train=train, layout=layout, groups=groups, seed=seed if draws else None)
    return engine, certificates


def _compile(config: RunConfig, *, groups: Groups, device: torch.device, say: Callable[..., None]) -> Compile:
    """Compile what `train.compile` asks for; of CPU ranks on the first one first, as the others read its results.

    Raises:
        MachineError: it must compile, and a rank cannot; raised on every rank.
    """
    train, tensor = config.train, groups.tensor.size
    compiled = make_compile(train.compile, device=device)
    if compiled is as_it_is:  # on every rank
        return compiled
    family: Family = FAMILIES[config.model.family].load()
    # torch reads what was compiled for one GPU of a machine for no other one: GPUs do not wait for each other.
    first = device.type == "cuda" or groups.world.rank == 0
    began, split = time.perf_counter(), config.parallel.sequence and tensor > 1
    compiling = partial(
        compile_now,
        compiled,
        rows=train.micro_batch * config.data.sequence_length // (tensor if split else 1),
        widths=(config.model.hidden, config.model.inner // tensor),
        heads=(config.model.heads // tensor, config.model.head_dim),
        dtype=dtype_of(train.precision),
        device=device,
        split=split,
        drops=config.model.dropout > 0,
        biases=family.biases,
        activation=ACTIVATIONS[family.activation],
    )
    for my_turn in (first, not first):
        fault = compiling_fault(compiling, device=device) if my_turn else None
        for rank, seen in enumerate(all_gather_object(fault, group=groups.world)):
            if seen is None:
                continue
            if train.compile != "auto":
                told = f"train.compile {train.compile}: rank {rank} cannot compile: {seen}"
                raise MachineError(f"{told}, or set train.compile to off")
            say("nothing is compiled, so steps are slower: rank %d cannot compile: %s", rank, seen)
            return as_it_is
    say("compiled what lies between the matrix products in %s", duration(time.perf_counter() - began))
    return compiled


@contextmanager
def record_refusal(ready: Ready, *, groups: Groups) -> Iterator[None]:
    """Append refused certificates to certificates.jsonl, next to the accepted ones of other starts."""
    try:
        yield
    except WrongPositions as refused:
        if groups.world.rank == 0:
            record = {**certificates_to_json(refused.certificates, ready.config.model), "refused": str(refused)}
            with report_write_errors(ready.run_dir):
                record_certificate(record, run_dir=ready.run_dir, step=ready.start.step)
        raise
