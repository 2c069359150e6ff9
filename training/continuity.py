"""What a resume must find again: the loss of a fixed small batch, and the samples that come next."""

from collections.abc import Iterator

from data_pipeline.loader import Loader
from parallel.engine import Engine
from training.checkpoint.read import Checkpoint

PROBE_SAMPLES = 4  # of the first step; every data rank scores them all, so that any layout means the same
# Nats per token. Layouts and attention backends differ by some 1e-6 in fp32, and by rounding of the weights in 16 bits.
ALLOWED = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05}


def check_loss(engine: Engine, loader: Loader) -> float:
    """Return the mean loss on the run's probe batch, nothing learned; every rank must call it."""
    return engine.mean_loss(loader.first_samples(PROBE_SAMPLES))


def changes_since(engine: Engine, loader: Loader, *, checkpoint: Checkpoint, precision: str) -> Iterator[str]:
    """Yield what is not what it was when a checkpoint was saved, the same on every rank; every rank must call it.

    Args:
        engine: Filled from the checkpoint.
        loader: The run's samples.
        checkpoint: What was saved.
        precision: Of the run.
    """
    saved = checkpoint.manifest
    order = loader.order_hash(saved.consumed_samples)
    if order != saved.order_hash:
        yield (
            f"checkpoint {checkpoint.path} was followed by other samples when it was saved (hash "
            f"{saved.order_hash[:12]}, now {order[:12]}): bring back the data that it was trained on"
        )
    loss, allowed = check_loss(engine, loader), ALLOWED[precision]
    if not abs(loss - saved.probe_loss) <= allowed:
        yield (
            f"checkpoint {checkpoint.path} gave the probe batch a loss of {saved.probe_loss:.6f} when it was saved, "
            f"now {loss:.6f} (allowed: {allowed:g} more or less): the model is not what it was; use the version that "
            "saved it"
        )
