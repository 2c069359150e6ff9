"""What an attention backend can do, and what a machine lacks for it."""

from typing import Any

import pytest

from configs.backends import AUTO, BACKENDS, EVERYWHERE, backend_of, candidates, unavailable, unsupported
from configs.errors import InputError
from configs.load import load_run
from configs.precisions import PRECISIONS

ALL = frozenset(backend.package for backend in BACKENDS.values() if backend.package)


def best(**changed: Any) -> list[str]:
    """Return the names of what `auto` may use for ALiBi in bf16 on an H100 with every package, or what is changed."""
    asked: dict[str, Any] = {"device": "cuda", "bias": "slopes", "precision": "bf16", "head_dim": 128}
    asked |= {"packages": ALL, "capability": (9, 0), **changed}
    return [backend.name for backend in candidates(**asked)]


def test_auto_takes_the_fastest_that_can_compute_it() -> None:
    assert best() == ["flash4", "flex", "sdpa"] == list(AUTO)
    assert best(packages=frozenset()) == best(precision="fp32") == best(head_dim=64) == ["flex", "sdpa"]
    assert best(capability=(8, 0)) == best(capability=(7, 0)) == ["flex", "sdpa"]
    assert best(capability=None) == ["flash4", "flex", "sdpa"]
    assert best(documents=True) == ["flex", "sdpa"]
    for alone in (
        {"device": "cpu"},
        {"bias": "table"},
        {"head_dim": 8},
        {"precision": "other"},
        {"capability": (6, 1)},
    ):
        assert best(**alone) == ["sdpa"], alone


def test_a_word_is_never_replaced_and_auto_never_refused() -> None:
    for position in ("alibi", "sinusoidal", "rotary", "t5", "kerple", "sandwich", "none"):
        for precision in PRECISIONS:
            asked = {"position": position, "precision": precision, "head_dim": 7}
            assert backend_of("auto", device="cuda", **asked) is BACKENDS[EVERYWHERE]
            assert backend_of("auto", device="cpu", **asked) is BACKENDS[EVERYWHERE]
            assert backend_of("flash4", device="cpu", **asked) is BACKENDS["flash4"]
            assert unsupported(BACKENDS[EVERYWHERE], **asked) is None
            load_run("demo", overrides=[f"model.position={position}", f"train.precision={precision}"])
    for device in ("cpu", "cuda"):
        assert unavailable(BACKENDS[EVERYWHERE], device=device, packages=frozenset()) is None
    with pytest.raises(
        InputError, match=r"flash4 cannot compute train\.precision fp32: use reference or sdpa or flex \(on a"
    ):
        load_run("demo", overrides=["model.attention=flash4", "train.precision=fp32"])


def test_a_backend_that_cannot_mask_documents_is_refused() -> None:
    masked = ["train.precision=bf16", "model.hidden=512", "model.heads=4", "data.mask_documents=true"]
    for name, backend in BACKENDS.items():
        if backend.documents:
            load_run("demo", overrides=[*masked, f"model.attention={name}"])
    with pytest.raises(
        InputError,
        match=r"flash4 cannot compute data\.mask_documents true: use reference or sdpa or flex \(on a GPU\) or flash",
    ):
        load_run("demo", overrides=[*masked, "model.attention=flash4"])
    assert load_run("demo", overrides=[*masked, "model.attention=auto"]).data.mask_documents


def test_a_precision_or_a_width_is_refused_by_name() -> None:
    for precision in PRECISIONS:
        assert unsupported(BACKENDS[EVERYWHERE], position="none", precision=precision, head_dim=128) is None
    why = unsupported(BACKENDS["flash"], position="none", precision="fp32", head_dim=64)
    assert why == "flash cannot compute train.precision fp32: use reference or sdpa or flex (on a GPU)"
    only = "flash4 cannot compute heads of 64 (model.hidden / model.heads), only 128: use sdpa or other heads"
    assert unsupported(BACKENDS["flash4"], position="none", precision="bf16", head_dim=64) == only


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("flash", (7, 5), "flash needs a GPU of compute capability 8.0, this one has 7.5: use sdpa"),
        ("flex", (6, 1), "flex needs a GPU of compute capability 7.0, this one has 6.1: use sdpa"),
        ("flash", (8, 0), None),
        ("flash", None, None),
        ("flash4", (8, 0), "flash4 needs a GPU of compute capability 9.0, this one has 8.0: use sdpa"),
        ("sdpa", (6, 1), None),
    ],
)
def test_a_gpu_that_is_too_old_is_named(name: str, capability: tuple[int, int] | None, expected: str | None) -> None:
    assert unavailable(BACKENDS[name], device="cuda", packages=ALL, capability=capability) == expected


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
        (
            "flash4",
            "cuda",
            {"flash_attn"},
            "flash4 needs the package flash-attn-4, which is not installed: install it or use sdpa",
        ),
    ],
)
def test_what_a_machine_lacks_is_said(name: str, device: str, packages: set[str], expected: str | None) -> None:
    assert unavailable(BACKENDS[name], device=device, packages=frozenset(packages)) == expected
