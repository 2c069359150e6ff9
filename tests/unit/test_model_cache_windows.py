"""A token after a long cache reads only what its windows need, and attends as with all keys."""

import pytest
import torch

from training.model import cache as cache_of_tokens
from training.model.cache import KeyValueCache
from training.model.kernels.reference import Reference
from training.model.kernels.sdpa import Sdpa
from training.model.positions.alibi import slopes
from training.model.positions.bias import SlopeBias
from training.model.windows import LosslessWindows

HEADS, HEAD_DIM, KEYS = 12, 16, 1500


@pytest.mark.parametrize("loud", [1.0, 80.0])
@torch.no_grad()
def test_a_token_after_a_long_cache_equals_all_keys(loud: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_of_tokens, "LONG_CACHE", 600)
    drawn = torch.Generator().manual_seed(int(loud))
    q, k, v = torch.randn(3, 2, HEADS, KEYS, HEAD_DIM, generator=drawn, dtype=torch.float64)
    k[:, :, 100] *= loud  # far away, and seen long before the tokens that decode
    windowed, whole = (SlopeBias(torch.tensor(slopes(HEADS), dtype=torch.float64)) for _ in range(2))
    windowed.lossless = LosslessWindows()
    attend, cache = Sdpa(windowed), KeyValueCache()
    exact = Reference(whole)(q, k, v)
    for start, end in ((0, KEYS - 3), *((place, place + 1) for place in range(KEYS - 3, KEYS))):
        new = slice(start, end)
        out = cache.attend(attend, 0, q[:, :, new], k[:, :, new], v[:, :, new])
        cache.advance(end - start)
        torch.testing.assert_close(out, exact[:, :, new], atol=1e-11, rtol=0)
    densities = [float(density) for density in windowed.lossless.take()]
    assert len(densities) == 4
    assert max(densities[1:]) < 0.95, "each token leaves keys out"
    assert torch.equal(cache.radii[0], k.norm(dim=-1).amax(2, keepdim=True)), "the largest norm of any key so far"
