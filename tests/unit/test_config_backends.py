"""What an attention backend can do, and what a machine lacks for it."""

import pytest

from configs.backends import AUTO, BACKENDS, backend_of, misfit, missing
from training.model.attention import MAKERS


def test_every_backend_of_the_table_can_be_made_and_no_other() -> None:
    assert MAKERS.keys() == BACKENDS.keys()
    assert backend_of("auto").name == AUTO


def test_the_default_can_compute_everything_everywhere() -> None:
    for position in ("alibi", "sinusoidal", "rotary", "t5", "none"):
        for precision in ("fp32", "bf16", "fp16"):
            assert misfit(backend_of("auto"), position=position, precision=precision, head_dim=7) is None
    for device in ("cpu", "cuda"):
        assert missing(backend_of("auto"), device=device, packages=frozenset()) is None


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
    assert missing(BACKENDS[name], device=device, packages=frozenset(packages)) == expected
