"""A loaded model's positions, scaled for texts longer than in training."""

from collections.abc import Callable
from typing import Any

from configs.scales import PositionScale, Scaling
from configs.schema import Model
from parallel.axes import Group
from training.model.attention import AttentionBlock, make_attention, windows_of
from training.model.decoder import Decoder
from training.model.positions.method import make_position


class ScaledPositions:
    """Sets a decoder's positions to what `--scale` means at a length, and has each setting measured before its use.

    Attributes:
        certificate: The certificate of the newest setting, as plain values.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: Model,
        *,
        tensor: Group,
        scale: PositionScale,
        train_length: int,
        measure: Callable[[Scaling], dict[str, Any]],
        documents: bool = False,
    ) -> None:
        """Scale for the training length.

        Args:
            decoder: A decoder with whole weights, in one process.
            model: Its shape.
            tensor: The tensor axis.
            scale: What was asked for; `configs.scales.scale_for` has accepted it.
            train_length: Tokens of a training sequence.
            measure: Returns the certificate of a scaling's positions; refuses wrong ones.
            documents: Whether attention may be asked to stay inside documents.
        """
        self._decoder, self._model, self._tensor = decoder, model, tensor
        self._scale, self._train_length, self._documents = scale, train_length, documents
        self._measure, self.certificate = measure, dict[str, Any]()
        self._now: Scaling | None = None
        self.fit(train_length)

    def fit(self, length: int) -> bool:
        """Scale for texts of a length; return whether that changes anything.

        Raises:
            TrainshortError: see `measure`.
        """
        scaling = self._scale.at(length, train_length=self._train_length)
        if scaling == self._now:
            return False
        self._now = None  # until it is measured: a refused one stays refused
        self._set(scaling)
        self.certificate = self._measure(scaling)
        self._now = scaling
        return True

    def _set(self, scaling: Scaling) -> None:
        """Give all blocks a scaled position method, and attention with its bias.

        The word embedding keeps its own: methods that can be scaled add nothing to embeddings and learn nothing.
        """
        position = make_position(self._model, {}, tensor=self._tensor, scaling=scaling)
        position.bias.lossless = windows_of(self._decoder)  # what counts the computed scores holds on to it
        attend = make_attention(self._model.attention, position.bias, documents=self._documents)
        for layer in self._decoder.layers:
            if isinstance(layer, AttentionBlock):
                layer.position, layer.attend = position, attend
