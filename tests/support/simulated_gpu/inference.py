"""Evaluate, score and decode with a rank's model on fake tensors, and return what was seen."""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import training.model.distributed as distributed
import training.model.kernels.next_token_triton as next_token_triton
from parallel.groups import lone_groups
from tests.support.simulated_gpu import Case
from tests.support.simulated_gpu.stand_ins import GPU, STAND_INS, VOCAB_SIZE, every_ranks, join_fake_ranks
from tests.support.simulated_gpu.tensors import AsFake, OnGpu, Seen
from training.model.cache import KeyValueCache
from training.model.single import SingleModel, inference_certificate, inference_model, lone_decoder

PASSES = 2
SERVED, END = (4, 1, 2049, 100), (0, 0, 0, 0)  # windows, rows, tokens and scored ones of a pass that rank 0 asks for


class _Kernel:
    """A Triton kernel that looks at where its arguments lie."""

    def __getitem__(self, _: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *arguments: Any, **_: int) -> None:
        for each in arguments:
            assert not isinstance(each, Tensor) or each.is_cuda, f"an argument of a kernel lies on {each.device}"


def _load_zeros(state: Any, *_: Any, **__: Any) -> None:
    for name, (parameter, _) in state.parameters.items():
        state.write(name, "weight", torch.zeros(parameter.shape))


_MORE: tuple[tuple[Any, str, Any], ...] = (
    (distributed, "all_gather_object", every_ranks),
    (distributed, "load_slices", _load_zeros),
    (next_token_triton, "attend_part", _Kernel()),
    (next_token_triton, "join_parts", _Kernel()),
)


def infer(case: Case) -> dict[str, Any]:
    """Return what was seen of a rank: where the host waited in the last of some calls of a kind, by kind."""
    config, layout, groups = join_fake_ranks(case)
    seen, waits = Seen(), dict[str, list[str]]()
    precision, documents = config.train.precision, config.data.mask_documents

    def note(kind: str, call: Callable[[], object]) -> None:
        for _ in range(PASSES):  # the first one makes tables, and copies them
            seen.waits.clear()
            call()
        waits[kind] = list(seen.waits)

    with ExitStack() as stack:
        for target, name, stand_in in (*STAND_INS, *_MORE):
            stack.enter_context(patch.object(target, name, stand_in))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), OnGpu(seen), AsFake()):
            stack.enter_context(mode)
        if layout.world_size > 1:
            checkpoint: Any = SimpleNamespace(config=config, vocab_size=VOCAB_SIZE)
            ours = distributed.load_distributed(checkpoint, groups=groups, device=GPU, precision=precision)
            certificate = ours.certificate
            seen.waits.clear()
            if case.rank:
                asked = [*[SERVED] * PASSES, END]
                with patch.object(FakeTensor, "tolist", lambda _: asked.pop(0)):
                    ours.serve()
                waits["passes"] = list(seen.waits)
            else:
                note("pass", lambda: ours.losses(torch.zeros(4, 2049, dtype=torch.int64), last=100))
        else:
            plan = inference_model(config.model)
            decoder = lone_decoder(plan, vocab_size=VOCAB_SIZE, documents=documents)

            def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
                note("capture", run)
                return run

            model = SingleModel(decoder, device=GPU, certificate={}, precision=precision, capture=capture)
            certificate = inference_certificate(
                decoder, plan, groups=lone_groups(), precision=precision, device=GPU, documents=documents
            )
            _use(model, note, documents=documents)
    return {"attention": certificate["ranks"][0]["backend"], "waits": waits, "off_device": seen.off_device}


def _use(model: SingleModel, note: Callable[[str, Callable[[], object]], None], *, documents: bool) -> None:
    tokens, rows = torch.zeros(4, 2049, dtype=torch.int64), (2,) if documents else ()
    note("losses", lambda: model.losses(torch.zeros(4, *rows, 2049, dtype=torch.int64)))
    note("score", lambda: model.score(tokens, torch.zeros(4, 2048, dtype=torch.bool)))
    cache = KeyValueCache()
    model.next_logits(torch.zeros(1, 5000, dtype=torch.int64), cache)
    note("token", lambda: model.next_logits(torch.zeros(1, 1, dtype=torch.int64), cache))
    note("cache repeated", lambda: cache.repeated(torch.tensor([3])))
