"""One rank's training, in the order in which things are built. Read this first."""

from collections.abc import Sequence

import torch

from configs.schema import RunConfig
from parallel.collectives import broadcast_from_first
from parallel.groups import make_groups
from parallel.start import ProcessRank, start, stop, use_deterministic_algorithms
from training.build import build_engine, record_refusal
from training.determinism import limits_of_determinism, nondeterminism_named
from training.folder import claim_run_folder, record_certificate, report_write_errors
from training.metrics_file import MetricsFile
from training.model.proof.certificate import Certificate, certificates_to_json
from training.observers import Observer
from training.preflight import Ready, make_ready
from training.progress_line import ProgressLine
from training.stopping import StopRequest
from training.tracking.observer import TrackingObserver
from training.trainer import build_trainer


@nondeterminism_named()
def train_rank(config: RunConfig, place: ProcessRank, *, accept_change: bool = False) -> None:
    """Train one rank of a run, from its newest checkpoint if it has one, to its last step or until asked to stop.

    Args:
        config: The run file with its overrides.
        place: This process among the ranks.
        accept_change: Resume even if model or data have changed since the checkpoint was saved.
    Raises:
        InputError: the run folder, the data or a checkpoint does not fit the run.
        MachineError: the last state cannot be saved, or a newer start of the run has taken over.
    """
    stop_request = StopRequest()
    stop_request.listen()  # before the slow part: a signal during start-up must not kill the rank
    ready = make_ready(config, world_size=place.world_size, device="cuda" if torch.cuda.is_available() else "cpu")
    config, layout = ready.config, ready.layout
    if config.train.deterministic:
        use_deterministic_algorithms()
    device = start(place)
    groups = make_groups(layout)
    fence = broadcast_from_first(lambda: claim_run_folder(config, layout=layout, device=device), group=groups.world)
    with record_refusal(ready, groups=groups):
        engine, certificates = build_engine(
            config, layout=layout, groups=groups, vocab_size=ready.prepared.vocab_size, device=device
        )
    trainer = build_trainer(
        ready,
        engine=engine,
        groups=groups,
        fence=fence,
        device=device,
        stop=stop_request,
        accept_change=accept_change,
    )
    # Building takes minutes: a start that was overtaken meanwhile must not replace the newer one's metrics.
    broadcast_from_first(fence.check, group=groups.world)
    observers = _observers(ready, step=trainer.start.step, certificates=certificates) if trainer.is_first_rank else []
    trainer.run(observers)
    stop()  # not after an error: other ranks may wait in a collective, and are ended only once this one has ended


def _observers(ready: Ready, *, step: int, certificates: Sequence[Certificate]) -> list[Observer]:
    config, run_dir, first = ready.config, ready.run_dir, certificates[0]
    with report_write_errors(run_dir):
        record = certificates_to_json(certificates, config.model)
        certificate_file = record_certificate(record, run_dir=run_dir, step=step)
        metrics = MetricsFile(run_dir, last_step=step)
    headline = (
        f"{ready.layout}; {first.position} positions, attention {first.backend} in {first.precision} on {first.device}"
    )
    tracking = TrackingObserver(config, run_dir=run_dir, certificate=certificate_file)
    lines = [headline, tracking.summary]
    if config.train.deterministic:
        lines.append(limits_of_determinism(ready.layout, device=first.device))
    progress = ProgressLine("\n".join(lines), first_step=step, steps=config.train.steps)
    return [metrics, progress, tracking]
