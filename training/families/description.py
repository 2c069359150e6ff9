"""A model's parameters, described once. Imports no torch.

Modules, initial weights, checkpoints, the parameter count and export all take shapes, split rules and initial values
from here. Export also takes the names in other formats.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import Literal

from configs.positions import POSITIONS
from configs.schema import Model
from parallel.parameter import Shard

OWN_PROBABILITY = 1 / 50  # of a token after itself, before training

Activation = Literal["gelu_tanh", "gelu_erf", "swiglu"]
Axis = Literal["head", "part", "dim"]
RowOrder = tuple[Axis, Axis, Axis]
QKV_ORDER: RowOrder = ("head", "part", "dim")
"""Order of the rows of a fused query-key-value matrix here, the slowest axis first; part is query, key or value.

Heads come first so that a tensor rank's slice is whole heads, each with its query, key and value.
"""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        shard: Its logical name, whole shape, split rule and initial values.
        huggingface: Its name in transformers' model of the family; None if that model has no place for it.
        gguf: Its name in a GGUF file, likewise.
        is_qkv: Whether its rows are a fused query, key and value, which other formats may want in another order.
    """

    shard: Shard
    huggingface: str | None
    gguf: str | None
    is_qkv: bool = False


@dataclass(frozen=True)
class WeightLayout:
    """How another format has a family's weights.

    Attributes:
        qkv: Order of the rows of a fused query-key-value matrix, the slowest axis first.
        transposes: Whether a block's matrices are [inputs, outputs].
        divides_by_width: Whether scores are divided by the width of a head, not by its square root.
    """

    qkv: RowOrder
    transposes: bool = False
    divides_by_width: bool = False


@dataclass(frozen=True)
class Family:
    """The description of one block design.

    Attributes:
        name: Value of `model.family`.
        parameters: Function from the family, a model and its vocabulary size to the parameters, without position
            tables.
        names: Names of each module in transformers and in GGUF, by the name here; {block} is the number of its block.
        norm_epsilon: Added to the variance in each LayerNorm.
        activation: Of the feed-forward: a GELU in its tanh form, an approximation, or the exact one; or SwiGLU.
        biases: Whether linears and norms have biases.
        huggingface, gguf: How weights are in these formats.
    """

    name: str
    parameters: "Callable[[Family, Model, int], Iterable[Parameter]]"
    names: Mapping[str, tuple[str, str]]
    norm_epsilon: float
    activation: Activation
    biases: bool
    huggingface: WeightLayout
    gguf: WeightLayout

    @property
    def embedding_norm(self) -> bool:
        """Whether a LayerNorm follows the word embedding."""
        return "embedding.norm" in self.names

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate: a third matrix, beside the one that widens the states."""
        return "feed_forward.gate" in self.names


def embedding_std(model: Model, *, vocab_size: int) -> float:
    """Return the std of a family's initial word embedding.

    The last norm scales a state to std 1. Before training it is little more than the token's own embedding. If the head
    shares the embedding, the token's own logit is then about std x hidden: with `init_std` alone, a wide model would
    start by predicting each token after itself. The std returned gives a token at most OWN_PROBABILITY after itself:
    the first loss is near ln(vocab_size).
    """
    if model.embedding_init_std is not None:
        return model.embedding_init_std
    if not model.tie_embeddings:
        return model.init_std
    # Where a position is added, the token is sqrt(v / (v + added)) of the state, with v = hidden x std^2 (see
    # `added_variance`). Solve own logit^2 = hidden x v x v / (v + added) for v.
    hidden, added = model.hidden, POSITIONS[model.position].added_variance
    square = max(log(vocab_size * OWN_PROBABILITY), 1.0) ** 2
    variance = (square + sqrt(square**2 + 4 * hidden * added * square)) / (2 * hidden)
    return min(model.init_std, sqrt(variance / hidden))


Shards = Mapping[str, Shard]
"""The shards of a model by logical name."""
