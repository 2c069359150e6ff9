"""Causal attention with a bias, by several backends behind one call. `configs.backends` says what each can do.

Only `Reference` computes anything of size [heads, seq, seq], and keeps it for the backward pass.
"""

from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from configs.backends import BACKENDS, unavailable
from configs.errors import MachineError
from training.model.bias import QUERY_BLOCK, Bias

KERNEL_READS = 8  # elements of a mask at a time, whatever their size


class Attention(Protocol):
    """One backend with one bias."""

    bias: Bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what each query reads from the keys before it; the queries are the last positions.

        Args:
            q: [batch, local_heads, queries, head_dim].
            k: [batch, local_heads, keys, head_dim].
            v: Like k.
        Returns:
            [batch, local_heads, queries, head_dim], in q's type.
        """
        ...


class Reference:
    """Attention written out: softmax(q k^T / sqrt(d) + bias) v, in one piece, in fp32 or wider."""

    def __init__(self, bias: Bias) -> None:
        self.bias = bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        wide = torch.promote_types(torch.float32, q.dtype)
        scores = (q.to(wide) @ k.to(wide).mT) / q.shape[-1] ** 0.5
        scores = scores + self.bias(rows=q.shape[2], keys=k.shape[2], device=q.device, dtype=wide)
        joined: Tensor = scores.softmax(-1) @ v.to(wide)
        return joined.to(q.dtype)


class Sdpa:
    """Attention by torch's scaled_dot_product_attention, a block of queries at a time."""

    def __init__(self, bias: Bias) -> None:
        self.bias = bias
        self._causal_only = bias.local_slopes is None and not bias.learned

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        queries, keys = q.shape[2], k.shape[2]
        if self._causal_only and queries in (1, keys):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
        rows = min(queries, QUERY_BLOCK)
        # On a GPU in the queries' type, as its kernels want it: rounding a relative bias loses little.
        dtype = q.dtype if q.is_cuda else torch.promote_types(torch.float32, q.dtype)
        strip = self.bias(rows=rows, keys=keys, device=q.device, dtype=dtype)
        # A mask with a gradient makes torch write the scores out, and keep them: each block is computed again instead.
        again = self.bias.learned and torch.is_grad_enabled()
        blocks = []
        for start in range(0, queries, QUERY_BLOCK):
            query = q[:, :, start : start + QUERY_BLOCK]
            seen = keys - queries + start + query.shape[2]
            mask = strip[:, :, rows - query.shape[2] :, keys - seen :]
            block = (query, k[:, :, :seen], v[:, :, :seen], mask)
            blocks.append(_attend_again(*block) if again else _attend_block(*block))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _attend_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend, and once more in the backward pass, which keeps nothing else; no randomness has to be repeated."""
    out: Tensor = checkpoint(_attend_block, q, k, v, mask, use_reentrant=False, preserve_rng_state=False)
    return out


def _attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # cuDNN is left out: it has read fp32 masks as bf16 and given NaN gradients with masks at some lengths
    # (pytorch#191612, #196678).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=aligned(mask))


def aligned(mask: Tensor) -> Tensor:
    """Return a mask whose start and rows lie where a GPU's kernel reads it as it is, [1, heads, rows, keys].

    A slice of the shared strip costs no memory in any layer; torch copies one whose strides are no multiples of
    8 elements, and the kernel refuses one that begins between them.
    """
    if all(offset % KERNEL_READS == 0 for offset in (mask.storage_offset(), *mask.stride()[:-1])):
        return mask
    keys = mask.shape[3]
    return F.pad(mask, (0, -keys % KERNEL_READS))[..., :keys]


class Flex:
    """Attention by torch's FlexAttention, compiled on a GPU; the bias is computed inside the kernel."""

    def __init__(self, bias: Bias) -> None:
        self.bias, self._slopes = bias, _Slopes(bias)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        queries, keys = q.shape[2], k.shape[2]
        here = self._slopes.on(q.device)

        def penalized(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score if here is None else score - here[head] * (query + (keys - queries) - key)

        flex_attention, mask = _flex_kernel(q.device.type), _flex_mask(queries, keys, device=q.device)
        out: Tensor = flex_attention(q, k, v, score_mod=penalized, block_mask=mask)
        return out


@lru_cache(maxsize=2)
def _flex_kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@lru_cache(maxsize=8)
def _flex_mask(queries: int, keys: int, *, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (keys - queries) >= key

    # Compiled it is computed block by block; else [queries, keys] would exist for a moment.
    return create_block_mask(seen, None, None, queries, keys, device=str(device), _compile=device.type == "cuda")


class Flash:
    """Attention by flash-attn 2, whose kernel takes ALiBi's slopes."""

    def __init__(self, bias: Bias) -> None:
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            raise MachineError(
                f"model.attention flash: the installed flash_attn cannot be imported ({error}): install one that is "
                "built for this torch, or use sdpa"
            ) from None
        why = unavailable(
            BACKENDS["flash"], device="cuda", packages=frozenset({"flash_attn"}), capability=_capability()
        )
        if why is not None:
            raise MachineError(f"model.attention {why}")
        self.bias, self._slopes, self._attend = bias, _Slopes(bias), flash_attn_func

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [batch, local_heads, queries, head_dim]."""
        here = self._slopes.on(q.device)
        # Its order is [batch, seq, heads, head_dim].
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: Tensor = self._attend(q, k, v, causal=True, alibi_slopes=here)
        return out.transpose(1, 2)


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


class _Slopes:
    """ALiBi's slopes where a kernel wants them, in fp32; sent there once."""

    def __init__(self, bias: Bias) -> None:
        self._slopes = bias.local_slopes

    def on(self, device: torch.device) -> Tensor | None:
        if self._slopes is not None and (self._slopes.device, self._slopes.dtype) != (device, torch.float32):
            self._slopes = self._slopes.to(device, torch.float32)
        return self._slopes


MAKERS: dict[str, type[Reference] | type[Sdpa] | type[Flex] | type[Flash]] = {
    "reference": Reference,
    "sdpa": Sdpa,
    "flex": Flex,
    "flash": Flash,
}
