"""`train.z_loss` is in the gradient of the run's engine, and not in the loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.step_sizes import StepSize
from tests.support.one_rank import one_rank

Z_LOSS = 0.1


def test_z_loss_is_in_the_gradient_alone(tmp_path: Path) -> None:
    with one_rank(tmp_path, f"train.z_loss={Z_LOSS}") as rank:
        batches = rank.loader(rank.config(tmp_path / "run")).step(0, StepSize(4, 8))
        outcome = rank.engine.train_step(batches, learning_rate=0.0)
        decoder = rank.engine.module
        losses, squares = [], []
        for batch in batches:
            logits = decoder(batch[:, :-1])
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
            squares.append(logits.logsumexp(-1).square().mean())
        loss, square = torch.stack(losses).mean(), torch.stack(squares).mean()
        norms = []
        for weight in (Z_LOSS, 0.0):
            gradients = torch.autograd.grad(loss + weight * square, [*decoder.parameters()], retain_graph=True)
            norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
    assert float(outcome.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(outcome.grad_norm) == pytest.approx(norms[0], rel=1e-5)
    assert abs(norms[0] - norms[1]) > 1e-3 * norms[1], "it can be told apart"
