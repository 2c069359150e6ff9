"""The mpt family: pre-norm blocks without biases, an exact GELU, no norm after the word embedding.

Source: MosaicML, "MPT-7B", 2023; the names are those of transformers' MptForCausalLM and llama.cpp.
"""

from training.families.description import Family, WeightLayout
from training.families.prenorm import prenorm_parameters

_NAMES = {
    "embedding.word": ("transformer.wte", "token_embd"),
    "attention_norm": ("transformer.blocks.{block}.norm_1", "blk.{block}.attn_norm"),
    "attention.query_key_value": ("transformer.blocks.{block}.attn.Wqkv", "blk.{block}.attn_qkv"),
    "attention.output": ("transformer.blocks.{block}.attn.out_proj", "blk.{block}.attn_output"),
    "feed_forward_norm": ("transformer.blocks.{block}.norm_2", "blk.{block}.ffn_norm"),
    "feed_forward.up": ("transformer.blocks.{block}.ffn.up_proj", "blk.{block}.ffn_up"),
    "feed_forward.down": ("transformer.blocks.{block}.ffn.down_proj", "blk.{block}.ffn_down"),
    "final_norm": ("transformer.norm_f", "output_norm"),
    "head": ("lm_head", "output"),
}

MPT = Family(
    name="mpt",
    parameters=prenorm_parameters,
    names=_NAMES,
    norm_epsilon=1e-5,
    activation="gelu_erf",
    biases=False,
    huggingface=WeightLayout(("part", "head", "dim")),
    gguf=WeightLayout(("part", "head", "dim")),
)
