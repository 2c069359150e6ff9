"""A weight's gradient is added in fp32 by the product that computes it."""

import pytest
import torch

from parallel.weight_gradient import add_product, hand_over


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_a_product_adds_to_wide_sums_unrounded(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    total, expected = torch.ones(7, 5, dtype=wide), torch.ones(7, 5, dtype=torch.float64)
    for _ in range(9):
        gradient, x = torch.randn(11, 7).to(dtype), torch.randn(11, 5).to(dtype)
        add_product(total, gradient, x)
        expected += gradient.double().t() @ x.double()
    assert total.dtype == wide
    torch.testing.assert_close(total.double(), expected, atol=0, rtol=tolerance * float(expected.abs().max() * 20))


def test_a_gradient_goes_to_the_buffer_or_to_autograd() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    gradient = torch.full((3, 2), 1 + 2.0**-20)
    assert torch.equal(hand_over(weight, gradient), torch.ones(3, 2, dtype=torch.bfloat16))  # type: ignore[arg-type]
    weight.main_grad = torch.ones(3, 2)  # type: ignore[attr-defined]
    assert hand_over(weight, gradient) is None
    assert torch.equal(weight.main_grad, gradient + 1)  # type: ignore[attr-defined]
