"""What an attention backend can do, and what a machine lacks for it."""

import pytest

from configs.backends import AUTO, BACKENDS, backend_of, unavailable, unsupported


def test_auto_is_a_backend_of_the_table() -> None:
    assert backend_of("auto") is BACKENDS[AUTO]


def test_the_default_can_compute_everything_everywhere() -> None:
    for position in ("alibi", "sinusoidal", "rotary", "t5", "none"):
        for precision in ("fp32", "bf16"):
            assert unsupported(backend_of("auto"), position=position, precision=precision, head_dim=7) is None
    for device in ("cpu", "cuda"):
        assert unavailable(backend_of("auto"), device=device, packages=frozenset()) is None


def test_a_precision_that_no_backend_has_is_left_to_a_rule() -> None:
    for backend in BACKENDS.values():
        assert "fp16" not in backend.precisions
        assert unsupported(backend, position="none", precision="fp16", head_dim=64) is None
    why = unsupported(BACKENDS["flash"], position="none", precision="fp32", head_dim=64)
    assert why == "flash cannot compute train.precision fp32: use reference or sdpa or flex"


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("flash", (7, 5), "flash needs a GPU of compute capability 8.0, this one has 7.5: use sdpa"),
        ("flex", (6, 1), "flex needs a GPU of compute capability 7.0, this one has 6.1: use sdpa"),
        ("flash", (8, 0), None),
        ("flash", None, None),
        ("sdpa", (6, 1), None),
    ],
)
def test_a_gpu_that_is_too_old_is_named(name: str, capability: tuple[int, int] | None, expected: str | None) -> None:
    packages = frozenset({"flash_attn"})
    assert unavailable(BACKENDS[name], device="cuda", packages=packages, capability=capability) == expected


@pytest.mark.parametrize(
    ("name", "device", "packages", "expected"),
    [
        ("flex", "cpu", set(), "flex needs a GPU and this machine's ranks run on cpu: use sdpa"),
        ("flex", "cuda", set(), None),
        ("flash", "cuda", {"flash_attn"}, None),
        (
            "flash",
            "cuda",
            set(),
            "flash needs the package flash_attn, which is not installed: install it or use sdpa",
        ),
    ],
)
def test_what_a_machine_lacks_is_said(name: str, device: str, packages: set[str], expected: str | None) -> None:
    assert unavailable(BACKENDS[name], device=device, packages=frozenset(packages)) == expected
