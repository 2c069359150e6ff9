"""Attention by flash-attn 2, whose kernel takes ALiBi's slopes."""

import torch
from torch import Tensor

from configs.backends import BACKENDS, unavailable
from configs.errors import MachineError
from training.model.kernels.slopes import DeviceSlopes
from training.model.positions.bias import Bias


class Flash:
    """flash-attn 2 with alibi_slopes; bf16 on a GPU."""

    def __init__(self, bias: Bias) -> None:
        """Import the kernel.

        Raises:
            MachineError: flash-attn cannot be imported, or this GPU is too old for it.
        """
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            raise MachineError(
                f"model.attention flash: the installed flash_attn cannot be imported ({error}): install one that is "
                "built for this torch, or use sdpa"
            ) from None
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        why = unavailable(BACKENDS["flash"], device="cuda", packages=frozenset({"flash_attn"}), capability=capability)
        if why is not None:
            raise MachineError(f"model.attention {why}")
        self.bias, self._slopes, self._attend = bias, DeviceSlopes(bias), flash_attn_func

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        here = self._slopes.on(q.device)
        # flash-attn's order is [batch, seq, heads, head_dim].
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        repeats = torch.are_deterministic_algorithms_enabled()
        window = self.bias.window
        keys_around = (-1, -1) if window is None else (window - 1, 0)  # before a query and after it; -1 for all
        out: Tensor = self._attend(
            q, k, v, causal=True, window_size=keys_around, alibi_slopes=here, deterministic=repeats
        )
        return out.transpose(1, 2)
