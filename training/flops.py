"""The FLOPs of training a token, in the two published conventions. Imports no torch.

`full` counts attention as if it had no causal mask: 6 N + 12 layers x hidden x length FLOPs a token, as PaLM (Chowdhery
et al. 2022, appendix B), llm-foundry and Megatron-LM do. `causal` counts the half that a causal model needs: 6 N + 6
layers x hidden x length, as FlashAttention's papers do. N counts all parameters, a tied embedding once. Recomputation
is not counted. Keys that a sliding window or lossless windows leave out are: both conventions are of the whole length.
"""

from functools import lru_cache

from configs.schema import Model
from training.families.table import parameter_count


@lru_cache  # each step asks, and the parameters of all layers are listed
def flops_per_token(model: Model, *, vocab_size: int, length: int) -> float:
    """Return forward and backward FLOPs of one token by the `full` convention: 6 N + 12 layers x hidden x length."""
    parameters = parameter_count(model, vocab_size=vocab_size)
    return 6.0 * parameters + 12.0 * model.layers * model.hidden * length


def causal_flops_per_token(model: Model, *, vocab_size: int, length: int) -> float:
    """Return forward and backward FLOPs of one token by the `causal` convention: 6 N + 6 layers x hidden x length."""
    full = flops_per_token(model, vocab_size=vocab_size, length=length)
    return full - 6.0 * model.layers * model.hidden * length
