"""The decoder: its list of layers, the same with and without stages; modules of one stage's layers and of all."""

from collections.abc import Sequence

from torch import Tensor, nn

from configs.choices import FAMILIES
from configs.schema import Model
from parallel.axes import Group
from parallel.documents import Documents
from parallel.head import Compile, as_it_is
from parallel.plan import LayerPlan, Recompute
from training.families.table import shards_of
from training.model.attention import make_attention
from training.model.cache import Cache
from training.model.positions.method import make_position


def plan_layers(
    model: Model,
    *,
    vocab_size: int,
    tensor: Group,
    recompute: Recompute,
    sequence: bool = False,
    documents: bool = False,
    z_loss: float = 0.0,
    compiled: Compile = as_it_is,
) -> LayerPlan:
    """Return the layers of a decoder, not yet built: a pipeline stage builds only its own.

    Args:
        model: The decoder's shape.
        vocab_size: Tokens, without padding.
        tensor: The tensor axis; each rank builds its own heads, columns and rows.
        recompute: What each block recomputes in the backward pass.
        sequence: Whether the sequence is split between the linears.
        documents: Whether attention may be asked to stay inside documents.
        z_loss: See `Head`.
        compiled: Compiles a function of tensors.
    """
    shards = shards_of(model, vocab_size=vocab_size)
    position = make_position(model, shards, tensor=tensor)
    attend = make_attention(model.attention, position.bias, documents=documents)
    plan_family = FAMILIES[model.family].load_layers()
    plan: LayerPlan = plan_family(
        model,
        shards,
        tensor=tensor,
        position=position,
        attend=attend,
        recompute=recompute,
        sequence=sequence,
        z_loss=z_loss,
        compiled=compiled,
    )
    return plan


class DecoderStage(nn.Module):
    """The layers of a plan that one pipeline stage holds, to compute without an engine."""

    def __init__(self, plan: LayerPlan, *, bounds: Sequence[int], stage: int) -> None:
        """Build the layers.

        Args:
            plan: All layers.
            bounds: Each stage's first block, and the end.
            stage: Number of the stage.
        """
        super().__init__()
        self.is_first, self.is_last = stage == 0, stage == len(bounds) - 2
        blocks = plan.blocks[bounds[stage] : bounds[stage + 1]]
        before = plan.before if self.is_first else ()
        makers = (*before, *blocks, *(plan.after if self.is_last else ()))
        self._last_block = len(before) + len(blocks) - 1 if self.is_last else None
        shares_embedding = self.is_last and plan.head_weight is None
        self.embedding = plan.embedding() if self.is_first or shares_embedding else None
        self._plan = plan
        self.layers = nn.ModuleList(make() for make in makers)
        self.head_weight = None
        if self.is_last:
            self.head_weight = self.embedding if plan.head_weight is None else plan.head_weight()
        self.shared = plan.shared

    def states(self, x: Tensor, cache: Cache | None = None, *, last: int | None = None) -> Tensor:
        """Return the states after this stage's layers, [seq, batch, hidden]; of the last stage those before the head.

        Args:
            x: Token ids [batch, seq] on the first stage, else the states of the stage before.
            cache: Keys and values of the tokens before, which these are added to; or documents to stay inside of.
            last: How many of the last places the last stage returns, [last, batch, hidden]; None for all. Of the others
                its last block computes keys and values.
        """
        if self.embedding is not None and self.is_first:
            x = self.embedding(x)
        for index, layer in enumerate(self.layers):
            some = {} if last is None or index != self._last_block else {"last": last}
            x = layer(x, cache=cache, **some)  # by their names: ZeRO's hooks expect tensors among the others
        return x

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return each token's loss in nats, without gradients, on the last stage: [..., hidden] and [...] -> [...]."""
        return self._plan.head.token_losses(self.head_weight, x, targets)


class Decoder(DecoderStage):
    """All layers of a plan in one module, for the engine without a pipeline and for one process."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan, bounds=(0, len(plan.blocks)), stage=0)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, *, last: int | None = None) -> Tensor:
        """Return the states before the head: [batch, seq] -> [seq, batch, hidden], or of the last places alone.

        With a cache, the tokens follow those in it and are added to it; with documents, attention stays inside them.
        """
        x = self.states(tokens, cache, last=last)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, documents: Documents | None = None) -> Tensor:
        """Return this rank's logits [batch, seq, local_vocab]; with targets, the mean loss.

        Args:
            tokens: [batch, seq].
            targets: [batch, seq].
            documents: Those that attention stays inside of; None for one per row.
        """
        x = self.hidden(tokens, documents)
        if targets is None:
            return self._plan.logits(self.head_weight, x)
        return self._plan.loss(self.head_weight, x, targets)

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits of whole states: [..., hidden] -> [..., local_vocab]."""
        return self._plan.head.row_logits(self.head_weight, x)
