"""Attention by FlashAttention 4's kernel, which FlexAttention compiles with the score function of `flex`."""

import torch

from configs.backends import BACKENDS, installed_packages, unavailable
from configs.errors import MachineError
from training.model.kernels.flex import Flex
from training.model.positions.bias import Bias


class Flash4(Flex):
    """FlexAttention with the kernel of flash-attn-4; 16 bits, on a GPU."""

    options = {"BACKEND": "FLASH"}
    any_length = False  # torch writes no such kernel for lengths that it does not know

    def __init__(self, bias: Bias) -> None:
        """Check the machine: torch imports the kernel when it compiles.

        Raises:
            MachineError: flash-attn-4 is not installed, or this GPU is too old for it.
        """
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        why = unavailable(BACKENDS["flash4"], device="cuda", packages=installed_packages(), capability=capability)
        if why is not None:
            raise MachineError(f"model.attention {why}")
        super().__init__(bias)
