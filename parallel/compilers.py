"""What torch's compilers need: a compiler of the machine, and a folder for what they compile. Imports no torch."""

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from configs.errors import InputError
from configs.files import try_folder

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def is_compiled(word: str, *, device: str) -> bool:
    """Return whether a value of `train.compile` compiles for a device type, cpu or cuda."""
    return word != "off" and (word != "auto" or device != "cpu")


def missing_compiler(device: str, *, environ: Mapping[str, str]) -> str | None:
    """Return what must be installed to compile for a device, None if nothing.

    Args:
        device: Its type: cpu or cuda.
        environ: The environment, which may name a compiler as CC or CXX.
    """
    if device == "cuda":
        if find_spec("triton") is None:
            return "install triton"
        # Triton compiles its launchers with it.
        c_compilers = [environ["CC"]] if "CC" in environ else ["gcc", "clang", "cc"]
        return None if any(map(shutil.which, c_compilers)) else "install a C compiler (gcc)"
    return None if shutil.which(environ.get("CXX", "g++")) else "install a C++ compiler (g++)"


def check_compiling(word: str, *, device: str, environ: Mapping[str, str]) -> None:
    """Refuse to compile on a machine that cannot, and a folder in which torch cannot keep what it compiles.

    With `auto`, a machine that cannot compile is no error.

    Args:
        word: Value of `train.compile`.
        device: Device type of the ranks: cpu or cuda.
        environ: Their environment.
    Raises:
        InputError: names what is missing, or the folder.
    """
    check_cache_folder(environ)
    if word == "triton" and device == "cpu":
        raise InputError("train.compile is triton, which needs a GPU, and none is visible here: set it to auto")
    lacks = missing_compiler(device, environ=environ) if word in ("on", "triton") else None
    if lacks is not None:
        told = f"train.compile is {word}, but this machine cannot compile"
        raise InputError(f"{told}: {lacks}, or set train.compile to off")


def check_cache_folder(environ: Mapping[str, str]) -> None:
    """Refuse a folder that torch cannot use. It makes it for optimizers and transformers too, compiled or not.

    Raises:
        InputError: names the variable, and why the folder cannot be written.
    """
    folder = environ.get(CACHE_VARIABLE)
    if folder is None:
        return
    try:
        try_folder(Path(folder).absolute())
    except OSError as error:
        raise InputError(
            f"{CACHE_VARIABLE} is {folder!r}, where torch cannot keep what it compiles ({error.strerror}): name a "
            "folder that can be written, or unset it"
        ) from None
