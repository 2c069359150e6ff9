"""The head: logits, and the loss with its gradient in chunks of tokens. Its weight is the word embedding's or its own.

Logits are many times larger than states. So a chunk's logits become the gradient of the loss at once, in the forward
pass: no two chunks are in memory together, and no product is computed twice.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.axes import Group
from parallel.layout import HEAD_CHUNK_BYTES
from parallel.weight_gradient import add_product, hand_over

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself: the head without a compiler."""
    return function


class Head:
    """Logits and losses on one tensor rank; logits stay split over the tensor ranks.

    `embedding` is each call's layer with the weight: the word embedding, or one of the head's own. It has the weight
    [local_vocab, hidden], the number of its last rows that are padding, and the token id of its first row. A padding
    row is not a token: the loss is computed without it, or it would depend on the layout.
    """

    def __init__(
        self, *, tensor: Group, sequence: bool = False, z_loss: float = 0.0, compiled: Compile = as_it_is
    ) -> None:
        """Set up the head.

        Args:
            tensor: The tensor axis.
            sequence: Whether the ranks hold [seq / tensor, batch, hidden] of the states.
            z_loss: Weight of the square of log(sum of exp(logits)) in the gradient, as in PaLM (Chowdhery et al. 2022).
                The loss that is returned is without it.
            compiled: Compiles a function of tensors; it contains no collective.
        """
        self.tensor, self.sequence, self.z_loss = tensor, sequence and tensor.size > 1, z_loss
        self._normalize = compiled(_normalize)
        self._probabilities = compiled(_probabilities)
        self._losses_and_probabilities = compiled(_losses_and_probabilities)

    def loss(self, embedding: Any, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch in nats, a scalar in fp32 (fp64 of fp64 states).

        The gradients are computed in the forward pass, unless gradients are off; the backward pass scales them.

        Args:
            embedding: The layer with the weight.
            x: States [seq, batch, hidden]; [seq / tensor, batch, hidden] if they are split.
            targets: Token ids [batch, seq], int64.
        """
        targets = targets.t()
        if torch.is_grad_enabled():
            loss: Tensor = _MeanLoss.apply(x, embedding.weight, targets, embedding, self)  # type: ignore[no-untyped-call]
            return loss
        return self.token_losses(embedding, self.gather(x), targets).mean()

    @torch.no_grad()
    def token_losses(self, embedding: Any, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each token in nats, without gradients: [..., hidden] and [...] -> [...]."""
        rows = _real_rows(embedding)
        losses = [
            self._losses(part @ rows.t(), local)
            for part, local in _chunks(x, targets - embedding.vocab_start_index, columns=len(embedding.weight))
        ]
        return torch.cat(losses).view(targets.shape)

    def logits(self, embedding: Any, x: Tensor) -> Tensor:
        """Return this rank's logits, padding at -inf: states as in `loss` -> [batch, seq, local_vocab]."""
        return self.row_logits(embedding, self.gather(x)).transpose(0, 1)

    def row_logits(self, embedding: Any, x: Tensor) -> Tensor:
        """Return this rank's logits, padding at -inf: [..., hidden] -> [..., local_vocab]."""
        assert self.tensor.size == 1 or not torch.is_grad_enabled(), "split logits have no gradient: take the loss"
        logits = x @ _real_rows(embedding).t()
        return nn.functional.pad(logits, (0, embedding.padding), value=-torch.inf) if embedding.padding else logits

    def gather(self, x: Tensor) -> Tensor:
        """Return whole states [seq, batch, hidden] of states as in `loss`."""
        if not self.sequence:
            return x
        whole = x.new_empty((self.tensor.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(whole, x.contiguous(), group=self.tensor.handle)
        return whole

    def scatter_sum(self, gradient: Tensor) -> Tensor:
        """Return this rank's part of the ranks' sum, [seq, batch, hidden] -> states as in `loss`."""
        if not self.sequence:
            return gradient
        part = gradient.new_empty((gradient.shape[0] // self.tensor.size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(part, gradient, group=self.tensor.handle)
        return part

    def losses_and_gradient(self, logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of a chunk and their gradient by its logits.

        Args:
            logits: This rank's columns, [tokens, real rows]; may be overwritten.
            local: Targets counted from this rank's first row, [tokens]; others are on other ranks.
        Returns:
            [tokens] fp32, and [tokens, real rows] in the type of the logits.
        """
        here, index = _held(local, columns=logits.shape[-1])
        more = None
        if self.tensor.size == 1 and not self.z_loss:
            losses, gradient = self._losses_and_probabilities(logits, index)
        else:
            log_probabilities, total = self._normalize(logits)
            losses, whole = self._joined(log_probabilities, total, here, index)
            more = 2 * self.z_loss * whole if self.z_loss else None  # p times the derivative of the square
            gradient = self._probabilities(log_probabilities, total - whole, more, logits.dtype)
        # A softmax's gradient is p, and p - 1 at the target: in fp32, as p may be near 1.
        target = torch.expm1(-losses)
        if more is not None:
            target += more * torch.exp(-losses)
        at_target = torch.where(here, target.to(gradient.dtype), gradient.gather(-1, index)[:, 0])
        return losses, gradient.scatter_(-1, index, at_target[:, None])

    def _losses(self, logits: Tensor, local: Tensor) -> Tensor:
        here, index = _held(local, columns=logits.shape[-1])
        if self.tensor.size == 1:
            return -_log_softmax(logits).gather(-1, index)[:, 0]
        log_probabilities, total = self._normalize(logits)
        return self._joined(log_probabilities, total, here, index)[0]

    def _joined(self, log_probabilities: Tensor, total: Tensor, here: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and the logarithm of all ranks' sum of exp(logits), [tokens] each."""
        if self.tensor.size == 1:
            return -log_probabilities.gather(-1, index)[:, 0], total
        predicted = (log_probabilities.gather(-1, index)[:, 0] + total).where(here, total.new_zeros(()))
        mine = torch.stack([total, predicted])
        ranks = mine.new_empty((self.tensor.size * 2, mine.shape[1]))
        dist.all_gather_into_tensor(ranks, mine, group=self.tensor.handle)
        whole = ranks[::2].logsumexp(0)
        return whole - ranks[1::2].sum(0), whole


class _MeanLoss(torch.autograd.Function):
    """The mean loss over all tokens, from states and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, targets: Tensor, embedding: Any, head: Head) -> Tensor:
        whole, rows = head.gather(x), _real_rows(embedding)
        dx = torch.empty_like(whole, memory_format=torch.contiguous_format)
        # Summed over chunks in fp32, as gradients are over micro-batches.
        dw = torch.zeros(weight.shape, dtype=_wide(weight.dtype), device=weight.device)
        losses, sums, start = [], [], 0
        for part, local in _chunks(whole, targets - embedding.vocab_start_index, columns=len(embedding.weight)):
            part_losses, gradient = head.losses_and_gradient(part @ rows.t(), local)
            part_dx = dx.view(-1, dx.shape[-1])[start : start + len(part)]
            torch.mm(gradient, rows, out=part_dx)
            if head.tensor.size > 1 and not head.sequence:  # while the weight's gradient is computed
                sums.append(dist.all_reduce(part_dx, group=head.tensor.handle, async_op=True))
            add_product(dw[: len(rows)], gradient, part)
            losses.append(part_losses)
            start += len(part)
            del gradient  # before the next chunk's logits, or three chunks are in memory together
        for pending in sums:
            pending.wait()
        ctx.save_for_backward(head.scatter_sum(dx), dw)
        ctx.weight, ctx.tokens = weight, targets.numel()
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.tokens
        return dx * scale, hand_over(ctx.weight, dw.mul_(scale)), None, None, None


def _real_rows(embedding: Any) -> Tensor:
    """Return the rows of tokens, [real rows, hidden]: a view."""
    weight: Tensor = embedding.weight
    return weight[: weight.shape[0] - embedding.padding]


def _chunks(x: Tensor, local: Tensor, *, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut states [..., hidden] and targets [...] into chunks of tokens whose logits take HEAD_CHUNK_BYTES at most.

    `columns` counts padding too, so that all tensor ranks cut alike.
    """
    most = max(1, HEAD_CHUNK_BYTES // (columns * x.element_size()))
    tokens = 1 << (most.bit_length() - 1)  # a power of two divides most micro-batches, and suits the matrix products
    flat = x.reshape(-1, x.shape[-1])
    yield from zip(torch.split(flat, tokens), torch.split(local.reshape(-1), tokens), strict=True)


def _held(local: Tensor, *, columns: int) -> tuple[Tensor, Tensor]:
    """Return which targets are columns of this rank, [tokens], and a valid column for each, [tokens, 1]."""
    return (local >= 0) & (local < columns), local.clamp(0, columns - 1)[:, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums: fp32, or fp64 of fp64."""
    return torch.promote_types(dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=_wide(logits.dtype))


def _losses_and_probabilities(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [tokens] and probabilities in the type of the logits, of one rank that holds all columns."""
    log_probabilities = _log_softmax(logits)
    losses = -log_probabilities.gather(-1, index)[:, 0]
    return losses, log_probabilities.exp_().to(logits.dtype)


def _normalize(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities among this rank's columns, and the logarithm of its sum of exp(logits), [tokens]."""
    log_probabilities = _log_softmax(logits)
    # At the largest logit, where the difference is exact enough: it is at most log(columns).
    return log_probabilities, logits.amax(-1).to(log_probabilities.dtype) - log_probabilities.amax(-1)


def _probabilities(log_probabilities: Tensor, shift: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
    probabilities = log_probabilities.add_(shift[:, None]).exp_()
    return (probabilities if more is None else probabilities.mul_(1 + more[:, None])).to(dtype)
