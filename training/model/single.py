"""A trained decoder in one process, for evaluation, export and generation: no engine, no ranks."""

import torch
from torch import Tensor

from parallel.groups import lone_tensor_group
from parallel.layers import split_cross_entropy
from parallel.shards import declared
from parallel.start import start_alone
from training.checkpoint.read import Checkpoint
from training.model.decoder import Decoder, plan_layers

HEAD_TOKENS = 1024  # tokens whose logits exist at one time


class SingleModel:
    """A decoder with whole weights on one device."""

    def __init__(self, decoder: Decoder, *, device: torch.device) -> None:
        self._decoder, self._device = decoder.to(device).eval(), device

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Return the loss of each predicted token; memory grows linearly with length.

        Args:
            tokens: [batch, length + 1] int64, of any length.
        Returns:
            Negative log-likelihood in nats of tokens[:, 1:], [batch, length] fp32, on the CPU.
        """
        tokens = tokens.to(self._device)
        x = self._decoder.hidden(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        losses = [
            split_cross_entropy(self._decoder.logits(part), target)
            for part, target in zip(torch.split(x, HEAD_TOKENS), torch.split(targets, HEAD_TOKENS), strict=True)
        ]
        return torch.cat(losses).view(tokens.shape[0], -1).cpu()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return [batch, seq, vocab] fp32 on the CPU, of tokens [batch, seq]."""
        logits: Tensor = self._decoder(tokens.to(self._device))
        return logits.cpu()


def load_single(checkpoint: Checkpoint) -> SingleModel:
    """Return the model of a checkpoint of any layout, in fp32."""
    device = start_alone()
    tensor = lone_tensor_group()
    plan = plan_layers(checkpoint.config.model, vocab_size=checkpoint.vocab_size, tensor=tensor, recompute=False)
    decoder = Decoder(plan)
    for name, (parameter, _) in declared(decoder).items():
        parameter.data = checkpoint.tensor(name, kind="weight")
    return SingleModel(decoder, device=device)
