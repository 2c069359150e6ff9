"""Describe an exported folder as a model of MLflow's flavour `transformers`, without loading or copying its weights.

`mlflow.transformers.save_model` copies the folder it is given, and of MLflow 3.17 fails with transformers 5. So the few
files that it would write are written here, beside links to the exported files.
"""

import json
import re
from pathlib import Path
from typing import Any

from training.versions import installed_version, python_version

EXAMPLE_TEXT = "Once upon a time"
"""The input example: a text to continue."""

# What `predict` takes besides the text, as names of transformers' generation, each with its default: greedy, as many
# tokens as `trainshort generate` writes.
_PARAMETERS: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("long", 64),
    "do_sample": ("boolean", False),
    "temperature": ("double", 1.0),
    "top_p": ("double", 1.0),
    "return_full_text": ("boolean", True),
}
_WEIGHTS, _TOKENIZER = "model", "components/tokenizer"  # where MLflow looks for them
_EXAMPLE_FILE, _SERVING_FILE = "input_example.json", "serving_input_example.json"
_ENVIRONMENT, _REQUIREMENTS = "python_env.yaml", "requirements.txt"
_PACKAGES = ("mlflow", "transformers", "torch")


def write_mlflow_model(place: Path, exported: Path, *, name: str, model_id: str, run_id: str | None) -> None:
    """Fill an empty folder with a model of MLflow: links to an exported folder's files, and what MLflow adds to them.

    Args:
        place: The empty folder.
        exported: A folder that `trainshort export --format hf` wrote.
        name: What the model is called.
        model_id: MLflow's id of the model.
        run_id: MLflow's id of the run that trained it; None if there is none.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    files = sorted(path for path in exported.iterdir() if path.is_file())
    tokenizer = [path for path in files if path.name.startswith(("tokenizer", "special_tokens"))]
    for folder, linked in ((_WEIGHTS, files), (_TOKENIZER, tokenizer)):
        # links to files, and no link to the folder: what uploads a folder does not enter a link
        (place / folder).mkdir(parents=True)
        for path in linked:
            (place / folder / path.name).symlink_to(path.absolute())
    _write_json(place / _EXAMPLE_FILE, [EXAMPLE_TEXT])
    _write_json(place / _SERVING_FILE, {"inputs": [EXAMPLE_TEXT]})
    _write_environment(place)
    text = Schema([ColSpec("string")])
    parameters = [ParamSpec(key, kind, default) for key, (kind, default) in _PARAMETERS.items()]
    model = Model(
        model_id=model_id,
        run_id=run_id,
        signature=ModelSignature(inputs=text, outputs=text, params=ParamSchema(parameters)),
        saved_input_example_info={
            "artifact_path": _EXAMPLE_FILE,
            "serving_input_path": _SERVING_FILE,
            "type": "json_object",
        },
        model_size_bytes=sum(path.stat().st_size for path in files),
    )
    model.add_flavor("transformers", **_flavour(exported, name=name))
    # as `mlflow.pyfunc.add_to_model` does, whose import warns of MLflow's own code
    model.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=python_version(),
        env={"virtualenv": _ENVIRONMENT},
    )
    model.save(str(place / "MLmodel"))


def _flavour(exported: Path, *, name: str) -> dict[str, Any]:
    """Return what `mlflow.transformers` reads to load a folder."""
    config, tokenizer = (
        json.loads((exported / file).read_text(encoding="utf-8")) for file in ("config.json", "tokenizer_config.json")
    )
    return {
        "transformers_version": installed_version("transformers"),
        "code": None,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": config["architectures"][0],
        "source_model_name": name,
        "model_binary": _WEIGHTS,
        "torch_dtype": f"torch.{config['dtype']}",
        "components": ["tokenizer"],
        "tokenizer_type": tokenizer["tokenizer_class"],
    }


def _write_environment(place: Path) -> None:
    """Write the versions that loaded the folder for the comparison; JSON is YAML too."""
    # a build of torch for one driver, 2.13.0+cpu, is in no registry of packages
    versions = {package: re.sub(r"\+.*", "", installed_version(package) or "") for package in _PACKAGES}
    lines = [f"{package}=={version}\n" for package, version in versions.items() if version]
    (place / _REQUIREMENTS).write_text("".join(lines), encoding="utf-8")
    environment = {
        "python": python_version(),
        "build_dependencies": ["pip"],
        "dependencies": [f"-r {_REQUIREMENTS}"],
    }
    _write_json(place / _ENVIRONMENT, environment)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")
