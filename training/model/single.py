"""A trained decoder in one process, for evaluation, export and generation: no engine, no other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from configs.schema import Model
from parallel.groups import lone_groups
from parallel.layers import split_cross_entropy
from parallel.shards import declared
from parallel.start import flush_denormals, start_alone
from training.checkpoint.read import Checkpoint
from training.model.cache import KeyValueCache
from training.model.decoder import Decoder, plan_layers
from training.model.proof.certificate import certificates_to_json, certify

HEAD_TOKENS = 1024  # tokens whose logits are in memory at one time
READ_OTHERWISE = "read the checkpoint with another torch or on another machine, and report this"


@contextmanager
def _inference() -> Iterator[None]:
    """Compute without gradients, fast in any thread: another than the loader's does not flush denormals by itself."""
    flush_denormals()
    with torch.no_grad():
        yield


class SingleModel:
    """A decoder with whole weights on one device.

    Attributes:
        certificate: The certificate of its positions, as plain values.
    """

    def __init__(self, decoder: Decoder, *, device: torch.device, certificate: dict[str, Any]) -> None:
        self._decoder, self._device = decoder.to(device).eval(), device
        self.certificate = certificate

    @_inference()
    def losses(self, tokens: Tensor) -> Tensor:
        """Return the loss of each predicted token; memory grows linearly with length.

        Args:
            tokens: [batch, length + 1] int64, of any length.
        Returns:
            Negative log-likelihood in nats of tokens[:, 1:], [batch, length] fp32, on the CPU.
        """
        tokens = tokens.to(self._device)
        x = self._decoder.hidden(tokens[:, :-1]).flatten(0, 1)  # [batch * length, hidden]
        targets = tokens[:, 1:].flatten()
        losses = [
            split_cross_entropy(self._decoder.logits(part), target)
            for part, target in zip(torch.split(x, HEAD_TOKENS), torch.split(targets, HEAD_TOKENS), strict=True)
        ]
        return torch.cat(losses).view(tokens.shape[0], -1).cpu()

    @_inference()
    def next_logits(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the token after the last, [batch, vocab] fp32 on the CPU.

        Args:
            tokens: The tokens that follow those in the cache, [batch, new] int64.
            cache: Keys and values of the tokens before; the new tokens are added to it.
        """
        x = self._decoder.hidden(tokens.to(self._device), cache)
        return self._decoder.logits(x[:, -1]).cpu()

    @_inference()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return [batch, seq, vocab] fp32 on the CPU, of tokens [batch, seq]."""
        logits: Tensor = self._decoder(tokens.to(self._device))
        return logits.cpu()


def load_single(checkpoint: Checkpoint) -> SingleModel:
    """Return the model of a checkpoint of any layout, in fp32 with the default attention, whatever it trained with.

    `reference` is replaced too: it computes all scores at once, which do not fit in memory at long lengths.

    Raises:
        TrainshortError: its positions are wrong; see `training.model.proof.certificate`.
    """
    model = checkpoint.config.model.model_copy(update={"attention": "auto"})
    decoder = lone_decoder(model, vocab_size=checkpoint.vocab_size)
    for parameter, shard in declared(decoder).values():
        parameter.data = checkpoint.slice(shard, kind="weight", part=None)
    device = start_alone()
    decoder.to(device)
    certificates = certify(
        decoder, model, groups=lone_groups(), precision="fp32", device=device, otherwise=READ_OTHERWISE
    )
    return SingleModel(decoder, device=device, certificate=certificates_to_json(certificates, model))


def lone_decoder(model: Model, *, vocab_size: int) -> Decoder:
    """Return a decoder in a world of one, its weights not yet set, on the CPU."""
    start_alone()
    return Decoder(plan_layers(model, vocab_size=vocab_size, tensor=lone_groups().tensor, recompute=False))
