"""ALiBi's slopes on a device, for kernels that compute the bias themselves."""

import torch
from torch import Tensor

from training.model.positions.bias import Bias


class DeviceSlopes:
    """The slopes of a bias in fp32; copied to a device once."""

    def __init__(self, bias: Bias) -> None:
        self._slopes = bias.local_slopes

    def on(self, device: torch.device) -> Tensor | None:
        """Return the slopes [local_heads] fp32 on a device, None if the bias has none."""
        if self._slopes is not None and (self._slopes.device, self._slopes.dtype) != (device, torch.float32):
            self._slopes = self._slopes.to(device, torch.float32)
        return self._slopes
