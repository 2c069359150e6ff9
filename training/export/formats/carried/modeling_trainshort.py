"""A decoder language model that trainshort trained, for transformers 4.57 and 5. This file needs nothing else.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The bias of the scores is computed from distances in fp32, so ALiBi is as good in bfloat16 as in float32, and attention
runs through torch's scaled_dot_product_attention, a block of queries at a time: memory grows with the length, not with
its square. All attention goes this way, whatever `attn_implementation` says.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

CARRIED_POSITIONS = ("alibi", "sinusoidal", "rotary", "t5", "none")
QUERIES = 256  # of a block
T5_TABLE, T5_FARTHEST = 32, 128  # buckets of distance, and the distance from which on all share the last


class TrainshortConfig(PretrainedConfig):
    """What the model is built from.

    Attributes:
        layers, hidden, heads, feed_forward: Blocks, width of the states, attention heads, width of the feed-forward.
        position: One of CARRIED_POSITIONS.
        alibi_bias_max: ALiBi's steepness: of a power of two of heads the flattest has slope 2^-alibi_bias_max.
        window: Tokens that a query sees, itself included; None for all before it.
        biases, embedding_norm: Whether linears and norms have biases, and a LayerNorm follows the word embedding.
        activation: `gelu_tanh`, an approximation, `gelu_erf`, the exact function, or `swiglu`, which has a gate.
        norm_epsilon: Added to the variance in each LayerNorm.
        dropout: In training, on the embedding and on what each sublayer adds.
        train_length: Tokens of a training sequence.
        seq_length: Tokens of the longest text for which the model was measured to be good. Longer texts work too.
    """

    model_type = "trainshort"
    attribute_map = {"num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads"}
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        layers: int = 12,
        hidden: int = 768,
        heads: int = 12,
        feed_forward: int = 3072,
        position: str = "alibi",
        alibi_bias_max: int = 8,
        window: int | None = None,
        biases: bool = True,
        embedding_norm: bool = True,
        activation: str = "gelu_tanh",
        norm_epsilon: float = 1e-5,
        dropout: float = 0.0,
        train_length: int | None = None,
        seq_length: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        if position not in CARRIED_POSITIONS:
            raise ValueError(f"position is {position!r}, and this code knows {', '.join(CARRIED_POSITIONS)}")
        self.vocab_size, self.layers, self.hidden, self.heads = vocab_size, layers, hidden, heads
        self.feed_forward, self.position, self.alibi_bias_max = feed_forward, position, alibi_bias_max
        self.window, self.biases, self.embedding_norm, self.activation = window, biases, embedding_norm, activation
        self.norm_epsilon, self.dropout, self.use_cache = norm_epsilon, dropout, use_cache
        self.train_length, self.seq_length = train_length, seq_length
        super().__init__(**others)
        self.tie_word_embeddings = tie_word_embeddings  # last: transformers 4 has a default


class TrainshortEmbedding(nn.Module):
    """Word embedding, positions if they are added to it, norm, dropout."""

    def __init__(self, config: TrainshortConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, added: Tensor | None) -> Tensor:
        """Return states [batch, seq, hidden] from word embeddings, and sines and cosines of the positions if any."""
        if added is not None:
            x = x * x.shape[-1] ** 0.5 + added.to(x.dtype)
        return self.dropout(self.norm(x))


class TrainshortAttention(nn.Module):
    """Attention of all heads; the rows of `query_key_value` are each head's query, key and value in turn."""

    def __init__(self, config: TrainshortConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.heads
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden, bias=config.biases)
        self.output = nn.Linear(config.hidden, config.hidden, bias=config.biases)

    def forward(
        self, x: Tensor, *, bias: Tensor | None, padding: Tensor | None, turns: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Return [batch, seq, hidden]; see `TrainshortBlock`."""
        batch, seq, hidden = x.shape
        qkv = self.query_key_value(x).view(batch, seq, self.heads, 3, hidden // self.heads)
        q, k, v = qkv.transpose(1, 2).unbind(3)  # [batch, heads, seq, head_dim] each
        if turns is not None:
            q, k = rotate_by(q, turns), rotate_by(k, turns)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attended = attend_blockwise(q, k, v, bias=bias, padding=padding)
        return self.output(attended.transpose(1, 2).reshape(batch, seq, hidden))


class TrainshortFeedForward(nn.Module):
    """Two linears and a GELU, or a SwiGLU: a third linear, whose SiLU multiplies the first one's output."""

    def __init__(self, config: TrainshortConfig) -> None:
        super().__init__()
        hidden, inner, biases = config.hidden, config.feed_forward, config.biases
        self.up, self.down = nn.Linear(hidden, inner, bias=biases), nn.Linear(inner, hidden, bias=biases)
        self.gate = nn.Linear(hidden, inner, bias=biases) if config.activation == "swiglu" else None
        self.form = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, seq, hidden]."""
        wide = self.up(x)
        return self.down(F.gelu(wide, approximate=self.form) if self.gate is None else F.silu(self.gate(x)) * wide)


class TrainshortBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the states."""

    def __init__(self, config: TrainshortConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = _norm(config), _norm(config)
        self.attention = TrainshortAttention(config, layer=layer)
        self.feed_forward = TrainshortFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        """Return states from states, [batch, seq, hidden].

        Args:
            x: The states.
            how: `bias`, the strip of `distance_bias`, None for causal attention alone; `padding`, True where a key is
                padding, [batch, keys], None if none is; `turns`, from `rotary_turns`, if positions are rotary;
                `cache`, the keys and values before.
        """
        x = x + self.dropout(self.attention(self.attention_norm(x), **how))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TrainshortT5Bias(nn.Module):
    """T5's learned bias: a number per head and bucket of distance, shared by all blocks."""

    def __init__(self, config: TrainshortConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.heads, T5_TABLE))

    def forward(self, distances: int) -> Tensor:
        """Return the bias at each distance from 0 on, [heads, distances] fp32."""
        distance, exact = torch.arange(distances, dtype=torch.float64), T5_TABLE // 2
        scale = (T5_TABLE - exact) / math.log(T5_FARTHEST / exact)
        # Add 1e-9 so that a distance on a bucket's boundary does not round down.
        far = exact + (torch.log(distance.clamp(min=1) / exact) * scale + 1e-9).floor()
        bucket = torch.where(distance < exact, distance, far.clamp(max=T5_TABLE - 1)).long()
        return self.weight.float()[:, bucket.to(self.weight.device)]


class TrainshortForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head. State names are those of trainshort's checkpoints."""

    config_class = TrainshortConfig
    _tied_weights_keys = {"head.weight": "embedding.word.weight"}
    _no_split_modules = ["TrainshortBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def __init__(self, config: TrainshortConfig) -> None:
        super().__init__(config)
        self.embedding = TrainshortEmbedding(config)
        self.positions = nn.ModuleDict({"t5": TrainshortT5Bias(config)} if config.position == "t5" else {})
        self.blocks = nn.ModuleList(TrainshortBlock(config, layer=layer) for layer in range(config.layers))
        self.final_norm = _norm(config)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding."""
        return self.embedding.word

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding.word = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, whose weight is the word embedding's if `tie_word_embeddings` is true."""
        return self.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [batch, seq, vocab], with `labels` the loss too.

        Args:
            input_ids: Tokens, [batch, seq].
            attention_mask: 0 for padding, on any side, [batch, past + seq].
            position_ids: Positions for sinusoidal and rotary, [batch, seq]; counted without padding unless given. The
                other methods know distances alone.
            past_key_values: Keys and values before; one that grows, such as DynamicCache.
            inputs_embeds: Word embeddings instead of tokens, [batch, seq, hidden].
            labels: Tokens that the logits before them should predict, -100 for none, [batch, seq].
            use_cache: Whether to return keys and values.
            output_hidden_states: Whether to return the states before each block, and after the last norm.
            logits_to_keep: Compute the logits of so many last tokens; 0 for all.
            others: For the loss.
        Raises:
            ValueError: the mask does not fit, or the cache has a fixed size.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        x = self.embedding.word(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] | None = [] if wanted else None
        x = self._run(x, attention_mask, position_ids, past_key_values, states)
        logits = self.head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else (*states, x),
        )

    def _run(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None, kept: list[Tensor] | None
    ) -> Tensor:
        """Return what the head takes, [batch, seq, hidden], of word embeddings; keep the states before each block."""
        config, past = self.config, 0 if cache is None else int(cache.get_seq_length())
        keys = past + x.shape[1]
        padding = _padding(mask, keys=keys, cache=cache)
        if positions is None:
            real = torch.ones(1, keys, dtype=torch.bool) if padding is None else ~padding
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        added = sinusoids_of(positions, config.hidden).to(x.device) if config.position == "sinusoidal" else None
        head_dim = config.hidden // config.heads
        turns = rotary_turns(positions, head_dim).to(x.device) if config.position == "rotary" else None
        x = self.embedding(x, added)
        bias = self._bias(x, keys=keys, causal_is_enough=padding is None)
        for block in self.blocks:
            if kept is not None:
                kept.append(x)
            x = block(x, bias=bias, padding=padding, turns=turns, cache=cache)
        return self.final_norm(x)

    def _bias(self, x: Tensor, *, keys: int, causal_is_enough: bool) -> Tensor | None:
        """Return the strip of bias that all blocks share; None if causal attention alone will do."""
        config, queries = self.config, x.shape[1]
        if config.position == "alibi":
            slopes = torch.tensor(alibi_slopes(config.heads, config.alibi_bias_max))
            by_distance = -slopes[:, None] * torch.arange(keys)
        elif config.position == "t5":
            by_distance = self.positions["t5"](keys)
        elif causal_is_enough and queries in (1, keys) and (config.window is None or config.window >= keys):
            return None
        else:
            by_distance = torch.zeros(1, keys)
        # A CPU takes a bias in fp32 beside states in 16 bits. Other kernels want it in the type of the states: near
        # keys, whose distances are small, stay exact, and what is lost far away multiplies small weights.
        dtype = torch.promote_types(torch.float32, x.dtype) if x.device.type == "cpu" else x.dtype
        return distance_bias(by_distance.to(x.device, dtype), rows=min(queries, QUERIES), window=config.window)


def _norm(config: TrainshortConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden, eps=config.norm_epsilon, bias=config.biases)


def _padding(attention_mask: Tensor | None, *, keys: int, cache: Cache | None) -> Tensor | None:
    """Return True where a key is padding, [batch, keys]; None if none is."""
    if getattr(cache, "is_compileable", False):
        raise ValueError("this model needs a cache that grows, such as DynamicCache, not one of a fixed size")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != keys:
        raise ValueError(f"attention_mask must be [batch, {keys}], got {list(attention_mask.shape)}")
    padding = attention_mask == 0
    return padding if bool(padding.any()) else None


def alibi_slopes(heads: int, bias_max: int) -> list[float]:
    """Return each head's slope: those of the power of two below, then every other one of the power of two above."""
    below = 2 ** int(math.log2(heads))
    first = [2.0 ** (-bias_max * (head + 1) / below) for head in range(below)]
    return first + [2.0 ** (-bias_max * (head + 0.5) / below) for head in range(heads - below)]


def distance_bias(by_distance: Tensor, *, rows: int, window: int | None) -> Tensor:
    """Return the bias of a text's last queries on its last keys, -inf where a key is ahead or out of the window.

    It depends on distance alone, so that any block of queries takes the strip's last rows and columns.

    Args:
        by_distance: Bias at each distance from 0 on, [heads or 1, keys].
        rows: Queries.
        window: Keys that a query sees.
    Returns:
        [1, heads or 1, rows, keys that a row sees].
    """
    keys = by_distance.shape[1]
    if window is not None and window < keys:
        width = min(keys, rows + window - 1)
        by_distance = F.pad(by_distance[:, :window], (0, width - window), value=-torch.inf)
    # The longest distance first, then keys ahead: each row is the row below, shifted by one.
    line = F.pad(by_distance.flip(1), (0, rows - 1), value=-torch.inf)
    return line.unfold(1, line.shape[1] - rows + 1, 1).flip(1)[None]


def attend_blockwise(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    """Return causal attention, [batch, heads, queries, head_dim], a block of queries and the keys they see at a time.

    Args:
        q: The last positions of the keys, [batch, heads, queries, head_dim].
        k: [batch, heads, keys, head_dim].
        v: Like k.
        bias: From `distance_bias`; None for causal attention alone.
        padding: True where a key is padding, [batch, keys]; None if none is.
    """
    queries, keys = q.shape[2], k.shape[2]
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
    outputs = []
    for start in range(0, queries, QUERIES):
        count = min(QUERIES, queries - start)
        seen = keys - queries + start + count  # up to the block's last query
        near = slice(max(0, seen - bias.shape[3]), seen)
        mask = bias[:, :, bias.shape[2] - count :, bias.shape[3] - (near.stop - near.start) :]
        if padding is not None:
            # Not -inf: a query that sees nothing else, being padding itself, is nan in some kernels.
            mask = mask.masked_fill(padding[:, None, None, near], torch.finfo(mask.dtype).min)
        outputs.append(_attend(q[:, :, start : start + count], k[:, :, near], v[:, :, near], mask))
    return torch.cat(outputs, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Rows must begin at multiples of 8 elements. cuDNN has been wrong with masks (pytorch#191612, #196678).
    keys = mask.shape[3]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(mask, (0, -keys % 8))[..., :keys])


def _angles(positions: Tensor, rates: Tensor) -> Tensor:
    """Return [batch, seq, rates] fp64, on the CPU: exact at any length, and some devices have no fp64."""
    return positions.to("cpu", torch.float64)[..., None] * rates


def sinusoids_of(positions: Tensor, hidden: int) -> Tensor:
    """Return all sines, then all cosines, of positions [batch, seq]: [batch, seq, hidden] fp32."""
    half = hidden // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = _angles(positions, rates)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def rotary_turns(positions: Tensor, head_dim: int) -> Tensor:
    """Return cosines and sines of positions [batch, seq]: [2, batch, 1, seq, head_dim / 2] fp32."""
    half = head_dim // 2
    angles = _angles(positions, 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half))[:, None]
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate_by(x: Tensor, turns: Tensor) -> Tensor:
    """Return queries or keys [batch, heads, seq, head_dim], turned by their positions in fp32, in their own type."""
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
