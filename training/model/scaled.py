"""A loaded model's positions, scaled for texts longer than those of the training."""

from collections.abc import Callable
from typing import Any

from configs.scales import PositionScale, Scaling
from configs.schema import Model
from parallel.groups import lone_groups
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
        scale: PositionScale,
        train_length: int,
        measure: Callable[[Scaling], dict[str, Any]],
    ) -> None:
        """Scale for the training length.

        Args:
            decoder: A decoder with whole weights, in one process.
            model: Its shape.
            scale: What was asked for; `configs.scales.scale_for` has accepted it.
            train_length: Tokens of a training sequence.
            measure: Returns the certificate of a scaling's positions; refuses wrong ones.
        """
        self._decoder, self._model, self._scale, self._train_length = decoder, model, scale, train_length
        self._measure, self._now = measure, scale.at(train_length, train_length=train_length)
        self.certificate = self._set()

    def fit(self, length: int) -> bool:
        """Scale for texts of a length; return whether that changes anything.

        Raises:
            TrainshortError: see `measure`.
        """
        scaling = self._scale.at(length, train_length=self._train_length)
        if scaling == self._now:
            return False
        self._now = scaling
        self.certificate = self._set()
        return True

    def _set(self) -> dict[str, Any]:
        _scale(self._decoder, self._model, self._now)
        return self._measure(self._now)


def _scale(decoder: Decoder, model: Model, scaling: Scaling) -> None:
    """Give all blocks a scaled position method, and attention with its bias.

    The word embedding keeps its own: methods that can be scaled add nothing to embeddings and learn nothing.
    """
    position = make_position(model, {}, tensor=lone_groups().tensor, scaling=scaling)
    position.bias.lossless = windows_of(decoder)  # whoever counts the computed scores has it
    attend = make_attention(model.attention, position.bias)
    for layer in decoder.layers:
        if isinstance(layer, AttentionBlock):
            layer.position, layer.attend = position, attend
