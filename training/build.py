"""Build a run's engine on this rank: the model, its initial weights, the certificate of its positions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from configs.schema import RunConfig
from parallel.axes import Groups
from parallel.deepspeed_engine import layer_placer, make_engine
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.pipeline import StagedModule
from parallel.seeds import initial_weights
from training.folder import record_certificate, report_write_errors
from training.model.decoder import Decoder, plan_layers
from training.model.proof.attention_weights import dtype_of
from training.model.proof.certificate import Certificate, WrongPositions, certificates_to_json, certify
from training.preflight import Ready


def build_engine(
    config: RunConfig, *, layout: Layout, groups: Groups, vocab_size: int, device: torch.device
) -> tuple[Engine, list[Certificate]]:
    """Return the engine of a run on this rank, with the run's initial weights, and all ranks' certificates.

    Args:
        config: The run.
        layout: How the ranks are split into axes.
        groups: Their process groups.
        vocab_size: Tokens, without padding.
        device: This rank's device.
    Raises:
        WrongPositions: a rank's positions are wrong; raised on every rank.
    """
    train, seed = config.train, config.run.seed
    plan = plan_layers(config.model, vocab_size=vocab_size, tensor=groups.tensor, recompute=train.recompute)
    if plan.shared is not None:  # a position table: the certificate needs its weights
        plan.shared.to(device, dtype_of(train.precision))
        initial_weights(plan.shared, seed=seed, tensor=groups.tensor)
    plan = plan.placed(layer_placer(train=train, layout=layout, groups=groups, device=device))
    module: nn.Module = StagedModule(plan, groups=groups) if layout.pipeline > 1 else Decoder(plan)
    certificates = certify(module, config.model, groups=groups, precision=train.precision, device=device)
    engine = make_engine(module, plan, train=train, layout=layout, groups=groups, seed=seed)
    return engine, certificates


@contextmanager
def record_refusal(ready: Ready, *, groups: Groups) -> Iterator[None]:
    """Append refused certificates to certificates.jsonl, next to the accepted ones of other starts."""
    try:
        yield
    except WrongPositions as refused:
        if groups.world.rank == 0:
            record = {**certificates_to_json(refused.certificates, ready.config.model), "refused": str(refused)}
            step = 0 if ready.newest is None else ready.newest.step
            with report_write_errors(ready.run_dir):
                record_certificate(record, run_dir=ready.run_dir, step=step)
        raise
