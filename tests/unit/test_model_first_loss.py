"""Before training every model's loss is near ln(vocabulary): all tokens are about equally likely."""

from functools import cache
from math import log

import pytest
import torch
import torch.nn.functional as F

from configs.load import RUNS, load_run
from configs.positions import POSITIONS
from configs.schema import Model
from parallel.seeds import initial_weights
from tests.support.models import ONE_RANK
from training.families.table import shards_of
from training.model.single import lone_decoder

SEQ = 128
TOO_LARGE = {"bloom-176b": {"hidden": 512, "heads": 4}}  # one layer has 2.5e9 parameters; its vocabulary stays whole


@cache  # several runs have the same model
def excess_of(model: str, *, vocab_size: int) -> float:
    """Return the loss of a model, in JSON, on random tokens before training, less ln(vocab_size)."""
    decoder = lone_decoder(Model.model_validate_json(model), vocab_size=vocab_size).eval()
    initial_weights(decoder, seed=1, tensor=ONE_RANK)
    tokens = torch.randint(0, vocab_size, (1, SEQ + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = decoder(tokens[:, :-1])[0]
    return float(F.cross_entropy(logits, tokens[0, 1:])) - log(vocab_size)


@pytest.mark.parametrize("run", sorted(path.stem for path in RUNS.glob("*.yaml")))
def test_the_first_loss_of_shipped_runs_is_near_ln_vocabulary(run: str) -> None:
    config = load_run(run)
    model = config.model.model_copy(update={"layers": 1, **TOO_LARGE.get(run, {})})
    assert abs(excess_of(model.model_dump_json(), vocab_size=config.data.vocab_size)) < 0.15


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("hidden", "init_std"), [(128, 0.06), (1024, 0.02)])
def test_the_first_loss_is_near_for_every_position(position: str, hidden: int, init_std: float) -> None:
    model = Model(layers=1, hidden=hidden, heads=4, position=position, init_std=init_std)
    assert abs(excess_of(model.model_dump_json(), vocab_size=4096)) < 0.25


def std_of(run: str, **changes: object) -> float | None:
    config = load_run(run)
    model = config.model.model_copy(update=changes)
    return shards_of(model, vocab_size=config.data.vocab_size)["embedding.word.weight"].init_std


def test_the_embeddings_std_is_the_users_if_set() -> None:
    assert std_of("alibi-125m", embedding_init_std=0.02) == 0.02
    assert std_of("alibi-125m", init_std=0.001) == 0.001  # small enough already


def test_sinusoids_do_not_hide_the_embedding() -> None:
    # They are added to the embedding, so it may be larger for the same first loss.
    assert std_of("sinusoidal-1b3") == load_run("sinusoidal-1b3").model.init_std
    sinusoidal, alibi = (std_of("alibi-125m", position=position) for position in ("sinusoidal", "alibi"))
    assert sinusoidal is not None
    assert alibi is not None
    assert sinusoidal > 1.5 * alibi
