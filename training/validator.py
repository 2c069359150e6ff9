"""Validation during training: mean losses on held-out samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import RunConfig
from data_pipeline.loader import held_out_parts
from data_pipeline.order import held_out_ids, parts_of
from data_pipeline.samples import Samples
from parallel.axes import Group
from parallel.engine import Engine


@dataclass(frozen=True)
class Validation:
    """Mean losses of a validation, nats per token.

    Attributes:
        loss: At the training length.
        by_length: At each further length, on the same text; empty without `evaluate.validation_lengths`.
        by_source: Of each source's samples at the training length; empty without `evaluate.by_source`.
    """

    loss: float
    by_length: dict[int, float]
    by_source: dict[str, float]


class Validator:
    """Measures the same held-out samples each time, whatever the layout and the micro-batch.

    Args:
        engine: The model.
        samples: Held-out samples of the longest length that the run validates at; None if it does not validate.
        config: The run.
        data: The data axis.
    """

    def __init__(self, engine: Engine, samples: Samples | None, *, config: RunConfig, data: Group) -> None:
        self._engine, self._samples, self._config, self._data = engine, samples, config, data

    def is_due(self, step: int) -> bool:
        """Return whether the run validates after this step."""
        return self._samples is not None and step % self._config.evaluate.every == 0

    def measure(self) -> Validation:
        """Return the losses over all ranks; every rank must call it."""
        samples, trained = self._samples, self._config.data.sequence_length
        assert samples is not None, "the run does not validate"
        ids = held_out_ids(samples.sizes, weights=samples.weights, count=self._config.evaluate.samples)
        further = [length for length in self._config.validation_lengths if length != trained]
        by_length = {length: self._loss(samples, ids, length=length) for length in further}
        if not self._config.evaluate.by_source:
            return Validation(self._loss(samples, ids, length=trained), by_length, {})
        sources = self._sources(samples, ids)
        by_source = {name: self._loss(samples, chosen, length=trained) for name, chosen in sources.items()}
        loss = sum(by_source[name] * len(chosen) for name, chosen in sources.items()) / len(ids)
        return Validation(loss, by_length, by_source)

    def _sources(self, samples: Samples, ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return the samples of each source that has some; with weights each source is a part of the data."""
        parts, sources = parts_of(ids, samples.sizes), self._config.data.sources
        return {sources[part].path: ids[parts == part] for part in np.unique(parts)}

    def _loss(self, samples: Samples, ids: NDArray[np.int64], *, length: int) -> float:
        """Return the mean loss of samples that are cut into pieces of a length.

        A forward pass has as many tokens as in training, or one piece.
        """
        tokens = self._config.train.micro_batch * self._config.data.sequence_length
        parts = held_out_parts(
            samples,
            ids,
            length=length,
            micro_batch=max(1, tokens // length),
            data_rank=self._data.rank,
            data_size=self._data.size,
        )
        total, count = 0.0, 0
        for batches, pieces in parts:
            total += pieces * self._engine.mean_loss(batches)
            count += pieces
        return total / count
