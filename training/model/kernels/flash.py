"""Attention by flash-attn 2, whose kernel takes ALiBi's slopes."""

import torch
from torch import Tensor

from configs.backends import BACKENDS, unavailable
from configs.errors import MachineError
from parallel.documents import Documents
from training.model.kernels.slopes import DeviceSlopes
from training.model.positions.bias import Bias


class Flash:
    """flash-attn 2 with alibi_slopes; 16 bits, on a GPU."""

    def __init__(self, bias: Bias) -> None:
        """Import the kernel.

        Raises:
            MachineError: flash-attn cannot be imported, or this GPU is too old for it.
        """
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            raise MachineError(
                f"model.attention flash: the installed flash_attn cannot be imported ({error}): install one that is "
                "built for this torch, or use sdpa"
            ) from None
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        why = unavailable(BACKENDS["flash"], device="cuda", packages=frozenset({"flash_attn"}), capability=capability)
        if why is not None:
            raise MachineError(f"model.attention {why}")
        self.bias, self._slopes = bias, DeviceSlopes(bias)
        self._attend, self._attend_each = flash_attn_func, flash_attn_varlen_func

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        # flash-attn's order is [batch, seq, heads, head_dim].
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        window = self.bias.window
        how = {
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),  # keys before and after; -1 for all
            "alibi_slopes": self._slopes.on(q.device),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if documents is None:
            out: Tensor = self._attend(q, k, v, **how)
        else:  # documents of any lengths follow each other: [batch * seq, heads, head_dim]
            ends, longest = documents.ends, documents.longest
            rows = (x.flatten(0, 1) for x in (q, k, v))
            out = self._attend_each(*rows, ends, ends, longest, longest, **how).view(q.shape)
        return out.transpose(1, 2)
