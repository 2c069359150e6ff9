"""The jais family: pre-norm blocks with biases and a SwiGLU, no norm after the word embedding.

Source: Sengupta et al., "Jais and Jais-chat", 2023, section 3.1, without its muP: a model of that folds its scales into
the weights. The names are those of its JAISLMHeadModel and of llama.cpp; the gate is its c_fc2.
"""

from training.families.description import Family, WeightLayout
from training.families.prenorm import prenorm_parameters

_NAMES = {
    "embedding.word": ("transformer.wte", "token_embd"),
    "attention_norm": ("transformer.h.{block}.ln_1", "blk.{block}.attn_norm"),
    "attention.query_key_value": ("transformer.h.{block}.attn.c_attn", "blk.{block}.attn_qkv"),
    "attention.output": ("transformer.h.{block}.attn.c_proj", "blk.{block}.attn_output"),
    "feed_forward_norm": ("transformer.h.{block}.ln_2", "blk.{block}.ffn_norm"),
    "feed_forward.gate": ("transformer.h.{block}.mlp.c_fc2", "blk.{block}.ffn_gate"),
    "feed_forward.up": ("transformer.h.{block}.mlp.c_fc", "blk.{block}.ffn_up"),
    "feed_forward.down": ("transformer.h.{block}.mlp.c_proj", "blk.{block}.ffn_down"),
    "final_norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
}

JAIS = Family(
    name="jais",
    parameters=prenorm_parameters,
    names=_NAMES,
    norm_epsilon=1e-5,
    activation="swiglu",
    biases=True,
    huggingface=WeightLayout(("part", "head", "dim"), transposes=True),
    gguf=WeightLayout(("part", "head", "dim"), divides_by_width=True),
)
