"""The bloom family: word embedding with a LayerNorm, pre-norm blocks with biases, a head that shares the embedding.

Source: BigScience, "BLOOM", 2022, section 3.2; the names are those of transformers' BloomForCausalLM and llama.cpp.
"""

from training.families.description import QKV_ORDER, Family, WeightLayout
from training.families.prenorm import prenorm_parameters

_NAMES = {
    "embedding.word": ("transformer.word_embeddings", "token_embd"),
    "embedding.norm": ("transformer.word_embeddings_layernorm", "token_embd_norm"),
    "attention_norm": ("transformer.h.{block}.input_layernorm", "blk.{block}.attn_norm"),
    "attention.query_key_value": ("transformer.h.{block}.self_attention.query_key_value", "blk.{block}.attn_qkv"),
    "attention.output": ("transformer.h.{block}.self_attention.dense", "blk.{block}.attn_output"),
    "feed_forward_norm": ("transformer.h.{block}.post_attention_layernorm", "blk.{block}.ffn_norm"),
    "feed_forward.up": ("transformer.h.{block}.mlp.dense_h_to_4h", "blk.{block}.ffn_up"),
    "feed_forward.down": ("transformer.h.{block}.mlp.dense_4h_to_h", "blk.{block}.ffn_down"),
    "final_norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
}

BLOOM = Family(
    name="bloom",
    parameters=prenorm_parameters,
    names=_NAMES,
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    biases=True,
    huggingface=WeightLayout(QKV_ORDER),
    gguf=WeightLayout(("part", "head", "dim")),
)
