"""What a Hugging Face configuration says of a BLOOM, MPT or Jais model, in our words. Imports no torch."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import InputError, first_line
from configs.path_text import require_folder
from configs.positions import ALIBI_BIAS_MAX
from configs.schema import Model
from training.families.bloom import BLOOM
from training.families.jais import JAIS
from training.families.mpt import MPT

Config = Mapping[str, Any]


@dataclass(frozen=True)
class RunningScales:
    """What Jais multiplies by when it runs, muP's scales, and what is folded into the weights here.

    Attributes:
        embedding: Of the word embedding.
        logits: Of the logits.
        divides_by_width: Whether scores are divided by the width of a head, not by its square root.
    """

    embedding: float = 1.0
    logits: float = 1.0
    divides_by_width: bool = False


@dataclass(frozen=True)
class IncomingModel:
    """A model of a Hugging Face folder.

    Attributes:
        model: The decoder's shape.
        vocab_size: Rows of its word embedding.
        train_length: Tokens that it was trained at; None if the configuration does not say.
        end_token: Id of the token that ends a document; None if it does not say.
        scales: What the model multiplies by when it runs.
    """

    model: Model
    vocab_size: int
    train_length: int | None
    end_token: int | None
    scales: RunningScales = RunningScales()


def read_model(folder: Path) -> IncomingModel:
    """Read config.json.

    Raises:
        InputError: it is missing, or describes a model that cannot be represented exactly; names each key.
    """
    require_folder(folder, what="HF_DIR", advice="give a folder with a model of Hugging Face")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(
            f"{folder} holds a model of type {kind!r}: only {', '.join(_READERS)} can be imported, as others have "
            "other blocks"
        )
    try:
        incoming, problems = _READERS[kind](config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"model.{first['loc'][0]} {first['input']!r}: {first['msg']}"
        raise InputError(f"{folder / 'config.json'} does not describe a model ({reason}): check the file") from None
    if problems:
        raise InputError(
            f"{folder} holds {kind.upper()} with {'; '.join(problems)}: it cannot be represented exactly, so it is not "
            "imported"
        )
    return incoming


def _bloom(config: Config) -> tuple[IncomingModel, list[str]]:
    wanted = {"apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": BLOOM.norm_epsilon}
    # older files have the second names
    model = Model(
        layers=config.get("n_layer", config.get("num_hidden_layers")),
        hidden=config.get("hidden_size", config.get("n_embed")),
        heads=config.get("n_head", config.get("num_attention_heads")),
        family=BLOOM.name,
        tie_embeddings=config.get("tie_word_embeddings", True),
        dropout=float(config.get("hidden_dropout", 0.0)),
    )
    length = config.get("train_length", config.get("seq_length"))
    return _incoming(model, config, length=length), [*_differing(config, wanted)]


def _mpt(config: Config) -> tuple[IncomingModel, list[str]]:
    attention = config.get("attn_config") or {}
    wanted_of_attention = {
        "alibi": True,
        "attn_type": "multihead_attention",
        "clip_qkv": None,
        "softmax_scale": None,
        "prefix_lm": False,
        "qk_ln": False,
        "qk_gn": False,
        "attn_uses_sequence_id": False,
        "rope": False,
        "sliding_window_size": -1,
    }
    wanted = {
        "no_bias": True,
        "logit_scale": None,
        "layer_norm_epsilon": MPT.norm_epsilon,
        "norm_eps": MPT.norm_epsilon,
    }
    hidden = config["d_model"]
    inner = config.get("expansion_ratio", 4) * hidden
    problems = [*_differing(config, wanted), *_differing(attention, wanted_of_attention, where="attn_config.")]
    if (norm := config.get("norm_type", "low_precision_layernorm")) not in ("layernorm", "low_precision_layernorm"):
        problems.append(f"norm_type {norm}")
    if inner != int(inner):
        problems.append(f"expansion_ratio {config['expansion_ratio']}")
    model = Model(
        layers=config["n_layers"],
        hidden=hidden,
        heads=config["n_heads"],
        feed_forward=None if inner == 4 * hidden else int(inner),
        family=MPT.name,
        tie_embeddings=config.get("tie_word_embeddings", True),
        alibi_bias_max=attention.get("alibi_bias_max", ALIBI_BIAS_MAX),
        dropout=float(config.get("resid_pdrop", 0.0)),
    )
    return _incoming(model, config, length=config.get("train_length", config.get("max_seq_len"))), problems


def _jais(config: Config) -> tuple[IncomingModel, list[str]]:
    wanted = {
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "layer_norm_epsilon": JAIS.norm_epsilon,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "alibi_scaling": None,
    }
    missing = [key for key in ("activation_function", "position_embedding_type") if key not in config]
    hidden = config.get("n_embd", config.get("hidden_size"))
    model = Model(
        layers=config.get("n_layer", config.get("num_hidden_layers")),
        hidden=hidden,
        heads=config.get("n_head", config.get("num_attention_heads")),
        feed_forward=config.get("n_inner") or 4 * hidden,
        family=JAIS.name,
        tie_embeddings=config.get("tie_word_embeddings", True),
        dropout=float(config.get("resid_pdrop", 0.1)),
    )
    # the first models have the second names
    scales = RunningScales(
        embedding=_scale(config, "mup_embeddings_scale", "embeddings_scale"),
        logits=_scale(config, "mup_output_alpha") * _scale(config, "mup_width_scale", "width_scale"),
        divides_by_width=bool(config.get("mup_scale_qk_dot_by_d", config.get("scale_qk_dot_by_d", False))),
    )
    length = config.get("train_length", config.get("n_positions", config.get("max_position_embeddings")))
    incoming = replace(_incoming(model, config, length=length), scales=scales)
    return incoming, [*(f"no {key}" for key in missing), *_differing(config, wanted)]


def _scale(config: Config, *names: str) -> float:
    """Return the number of the first key that is there; 1 if none is."""
    name = next((name for name in names if name in config), None)
    value = 1.0 if name is None else config[name]
    if type(value) not in (int, float) or not 0 < value < inf:
        raise TypeError(f"{name} {json.dumps(value)} is not a positive number")
    return float(value)


def _incoming(model: Model, config: Config, *, length: int | None) -> IncomingModel:
    end, rows = config.get("eos_token_id"), config["vocab_size"]
    if isinstance(end, list):
        end = end[0] if end else None
    for name, value in (("eos_token_id", end), ("vocab_size", rows)):
        if type(value) is not int and not (name == "eos_token_id" and value is None):
            raise TypeError(f"{name} {value!r} is not a whole number")
    return IncomingModel(model, rows, length, end)


def _differing(config: Config, wanted: Config, *, where: str = "") -> Iterator[str]:
    """Yield each key whose value is not the wanted one, which a missing key has in transformers."""
    for key, value in wanted.items():
        if (seen := config.get(key, value)) != value:
            yield f"{where}{key} {json.dumps(seen)} (only {json.dumps(value)})"


def _read_json(file: Path) -> Config:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{file.parent} has no {file.name}: give a folder with a model of Hugging Face; nothing is downloaded"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): check the file") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} does not hold a JSON object: check the file")
    return config


_READERS: dict[str, Callable[[Config], tuple[IncomingModel, list[str]]]] = {
    BLOOM.name: _bloom,
    MPT.name: _mpt,
    JAIS.name: _jais,
}
