"""Validation during training: the mean loss on held-out samples."""

from configs.schema import RunConfig
from data_pipeline.loader import held_out_parts
from data_pipeline.samples import Samples
from parallel.axes import Group
from parallel.engine import Engine


class Validator:
    """Measures the same held-out samples each time, whatever the layout and the micro-batch.

    Args:
        engine: The model.
        samples: Held-out samples; None if the run does not validate.
        config: The run.
        data: The data axis.
    """

    def __init__(self, engine: Engine, samples: Samples | None, *, config: RunConfig, data: Group) -> None:
        self._engine, self._samples, self._config, self._data = engine, samples, config, data

    def is_due(self, step: int) -> bool:
        """Return whether the run validates after this step."""
        return self._samples is not None and step % self._config.evaluate.every == 0

    def loss(self) -> float:
        """Return the mean loss in nats over all ranks; every rank must call it."""
        assert self._samples is not None, "the run does not validate"
        parts = held_out_parts(
            self._samples,
            count=self._config.evaluate.samples,
            micro_batch=self._config.train.micro_batch,
            data_rank=self._data.rank,
            data_size=self._data.size,
        )
        total, count = 0.0, 0
        for batches, samples in parts:
            total += samples * self._engine.mean_loss(batches)
            count += samples
        return total / count
