"""One rank's training, in the order in which things are built. Read this first."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from configs.backends import Backend, backend_of
from configs.schema import RunConfig
from configs.slow_parts import timed
from configs.terminal import Terminal
from parallel.axes import Groups
from parallel.collectives import broadcast_from_first
from parallel.groups import make_groups
from parallel.start import ProcessRank, start, stop, use_deterministic_algorithms
from training.build import build_engine, record_refusal
from training.determinism import limits_of_determinism, nondeterminism_named
from training.export.while_training import ExportsWhileTraining
from training.folder import claim_run_folder, device_name, record_certificate, report_write_errors
from training.hook import HookObserver
from training.incarnation import Fence
from training.metrics_file import MetricsFile
from training.model.proof.certificate import Certificate, certificates_to_json
from training.observers import BackgroundObserver, Observer
from training.preflight import Ready, make_ready
from training.progress_lines import build_line, verified_line
from training.progress_log import ProgressLog
from training.reproduction.starts import record_start
from training.resume import has_checkpoint
from training.stopping import StopRequest, remove_stop_file
from training.tracking.observer import TrackingObserver
from training.tracking.system import node_observers
from training.trainer import Trainer, build_trainer

logger = logging.getLogger(__name__)


@nondeterminism_named()
def train_rank(
    config: RunConfig, process: ProcessRank, *, accept_change: bool = False, terminal: Terminal | None = None
) -> None:
    """Train one rank of a run, from its newest checkpoint if it has one, to its last step or until asked to stop.

    Args:
        config: The run file with its overrides.
        process: This process among the ranks.
        accept_change: Resume even if model or data have changed since the checkpoint was saved.
        terminal: Where rank 0 shows a live line; None for nowhere.
    Raises:
        InputError: the run folder, the data or a checkpoint does not fit the run.
        MachineError: the last state cannot be saved, or a newer start of the run has taken over.
    """
    stop_request = StopRequest()
    # Before the slow part: a signal during start-up must not kill the rank.
    stop_request.listen(announce=process.rank == 0 and process.starter != "local")
    device_type, is_first = "cuda" if torch.cuda.is_available() else "cpu", process.rank == 0
    ready = make_ready(config, world_size=process.world_size, device=device_type, warn=is_first)
    config, layout, say = ready.config, ready.layout, logger.info if is_first else logger.debug
    if config.train.deterministic:
        use_deterministic_algorithms()
    device, groups, fence = _join(process, ready, say=say)
    resumes = has_checkpoint(config, world=groups.world)
    draws = not resumes and config.train.init_from is None and config.train.branch_from is None
    say("%s", build_line(_backend(config, device=device), draws=draws))
    with record_refusal(ready, groups=groups):
        engine, certificates = build_engine(
            config, layout=layout, groups=groups, vocab_size=ready.prepared.vocab_size, device=device, draws=draws
        )
    say("%s", verified_line(certificates, device=device_name(device)))
    trainer = build_trainer(
        ready,
        engine=engine,
        groups=groups,
        fence=fence,
        device=device,
        stop=stop_request,
        resumes=resumes,
        accept_change=accept_change,
    )
    # Building takes minutes: a start that was overtaken meanwhile must not replace the newer one's metrics.
    broadcast_from_first(fence.check, group=groups.world)
    observers = _observers(ready, process, trainer=trainer, certificates=certificates, terminal=terminal)
    if not stop_request.asked:
        say("training from step %d", trainer.start.step + 1)
    with _in_background(trainer, process, terminal=terminal or Terminal()) as background:
        trainer.run([*background, *observers])
        stop()  # not after an error: other ranks may wait in a collective, and are ended only once this one has ended


def _backend(config: RunConfig, *, device: torch.device) -> Backend:
    model = config.model
    return backend_of(
        model.attention,
        device=device.type,
        position=model.position,
        precision=config.train.precision,
        head_dim=model.head_dim,
        documents=config.data.mask_documents,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    )


def _join(process: ProcessRank, ready: Ready, *, say: Callable[..., None]) -> tuple[torch.device, Groups, Fence]:
    """Meet the other ranks, and make this start the run folder's newest."""
    config, layout = ready.config, ready.layout
    say("joining the other ranks" if process.world_size > 1 else "starting one rank")
    with timed("joined them" if process.world_size > 1 else "started it", say=say):
        device, groups = start(process), make_groups(layout)
    with timed("claimed the run folder", say=say):
        fence = broadcast_from_first(lambda: claim_run_folder(config, layout=layout, device=device), group=groups.world)
    return device, groups, fence


@contextmanager
def _in_background(trainer: Trainer, process: ProcessRank, *, terminal: Terminal) -> Iterator[list[BackgroundObserver]]:
    """Yield what works beside training, on rank 0 of a run that asks for it; at the end wait for what is left."""
    config, background = trainer.config, list[BackgroundObserver]()
    if not process.rank and config.track.hook:
        background.append(HookObserver(config, step=trainer.start.step, ranks=process.world_size))
    if not process.rank and config.checkpoint.export_every:
        exports = ExportsWhileTraining(config, fence=trainer.fence)
        exports.resume(trainer.start.step)
        background.append(exports)
    yield background
    finished = [each for each in background if each.training_finished]
    for each in finished:
        each.finish(asked=lambda: bool(trainer.stop.verdict(fence=trainer.fence, reads_folder=True)), terminal=terminal)
    if finished:
        remove_stop_file(trainer.fence)
        trainer.saver.remove_old()


def _observers(
    ready: Ready,
    process: ProcessRank,
    *,
    trainer: Trainer,
    certificates: Sequence[Certificate],
    terminal: Terminal | None,
) -> list[Observer]:
    config, run_dir, step = ready.config, ready.run_dir, trainer.start.step
    if process.rank:
        return node_observers(run_dir, process=process)
    with report_write_errors(run_dir):
        record = certificates_to_json(certificates, config.model)
        certificate_file = record_certificate(record, run_dir=run_dir, step=step)
        gpus = torch.cuda.device_count()
        gpu = torch.cuda.get_device_name() if gpus else None
        record_start(config, process, fence=trainer.fence, layout=ready.layout, step=step, gpu=gpu, gpus=gpus)
        metrics = MetricsFile(run_dir, last_step=step)
    tracking = TrackingObserver(config, run_dir=run_dir, certificate=certificate_file)
    logger.info("%s", tracking.summary)
    if config.train.deterministic:
        logger.info("%s", limits_of_determinism(ready.layout, device=certificates[0].device))
    # Closed in reverse: the summary does not wait for MLflow, which may take a minute.
    return [metrics, tracking, ProgressLog(config, first_step=step, best=metrics.best, terminal=terminal)]
