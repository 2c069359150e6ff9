"""Secrets of a run file: the one place that decides what may be printed, written to disk or sent to MLflow.

A tracking URI may hold a password, and `slurm.env` a token. The schema serializes both without their secrets, so the
run folder, checkpoints and MLflow get only what this module lets through; messages pass through `hide_secrets`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"passw|passphrase|pwd|secret|credential|token(?!iz)|signature|(?:api|access|private|account)[_-]?key"
    r"|(?:^|[_.-])(?:pass|auth|sig|key)$",
    re.IGNORECASE,
)
# What looks like a secret in any text: the user of a URI, a parameter of a URI, and a variable such as HF_TOKEN. A
# reference such as $HF_TOKEN is none.
_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)(?![^\s/@]*\$\{\w+\}@)(?:[^\s/@]+|[^\s/@:]*:[^\s@'\"]+)@")
_NAMED = re.compile(r"((?:[?&]([\w.%-]+)=|\b([A-Z][A-Z0-9_]*)['\"]?\s*[=:]\s*['\"]?))([^\s&'\",}\]$`]+)")
_REFERENCE = re.compile(r"\$\{(\w+)\}", re.ASCII)


@dataclass(frozen=True)
class _Uri:
    """A URI in parts: `https://`, `me:pw`, `host/path`, and the parameters that follow a question mark."""

    scheme: str
    user: str
    address: str
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "_Uri":
        scheme, slashes, rest = text.partition("://")
        if not slashes and not re.match(r"[^/@]*:[^/]*@", text):
            return cls("", "", text, ())  # a path
        if not slashes:
            scheme, rest = "", text  # me:pw@host: no URI, but its password must not be shown either
        # The user ends at the last @, since a password may hold / and ? as written. Without a host, an @ is in a path.
        head, _, query = rest.partition("?")
        has_user = not rest.startswith("/") and ("@" in head or (":" in head and "@" in query))
        user, _, address = (head if "@" in head else rest).rpartition("@") if has_user else ("", "", head)
        if has_user and "@" not in head:
            address, _, query = address.partition("?")
        if scheme.lower() in ("http", "https"):
            address, query = address.partition("#")[0], query.partition("#")[0]  # a fragment is never sent
        return cls(scheme + slashes, user, address, tuple(filter(None, re.split("[&;]", query))))

    @property
    def secret(self) -> str:
        """The password, or a user without one, which is then a token; empty if it is a reference such as ${PW}."""
        name, _, password = self.user.partition(":")
        return _literal(password or name)

    @property
    def secret_parameters(self) -> tuple[str, ...]:
        return tuple(pair for pair in self.parameters if _literal(pair.partition("=")[2]) and _is_secret_pair(pair))


def is_secret_name(name: str) -> bool:
    """Return whether a variable or a URI parameter of this name holds a secret, as HF_TOKEN does."""
    return _SECRET_NAME.search(unquote(name)) is not None


def without_password(uri: str) -> str:
    """Return a URI without user, password and secret parameters: https://me:pw@host/x becomes https://host/x.

    References to environment variables stay, as in https://me:${PW}@host.
    """
    parts = _Uri.of(uri)
    user = f"{parts.user}@" if parts.user and not parts.secret else ""
    public = [pair for pair in parts.parameters if pair not in parts.secret_parameters]
    return parts.scheme + user + parts.address + (f"?{'&'.join(public)}" if public else "")


def uri_secrets(uri: str) -> set[str]:
    """Return the secrets of a URI, as written and decoded."""
    parts = _Uri.of(uri)
    secrets = [parts.secret, *(pair.partition("=")[2] for pair in parts.secret_parameters)]
    # a library may take a / or ? in a password for the end of the host, and name what comes before it
    secrets += [piece for piece in re.split("[/?#@]", parts.secret) if len(piece) > 3]
    return {text for secret in secrets for text in (secret, unquote(secret)) if text}


def with_references(uri: str, *, variables: Mapping[str, str]) -> str:
    """Return a URI with the variables that it refers to, percent-encoded; one that is not set stays as written."""
    return _REFERENCE.sub(lambda found: quote(variables[found[1]], safe="") if found[1] in variables else found[0], uri)


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable is a secret by its name, holds a URI with one, or was hidden before."""
    return is_secret_name(name) or value == HIDDEN or without_password(value) != value


def public_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with *** for each secret."""
    return {name: HIDDEN if is_secret_variable(name, value) else value for name, value in variables.items()}


def hide_secrets(text: str, *, known: Iterable[str] = ()) -> str:
    """Return a text without what looks like a secret.

    Args:
        text: Any text, such as the message of a library.
        known: Secrets to hide wherever they stand.
    """
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(r"\1", text)
    return _NAMED.sub(lambda found: f"{found[1]}{HIDDEN}" if is_secret_name(found[2] or found[3]) else found[0], text)


def _is_secret_pair(pair: str) -> bool:
    return is_secret_name(pair.partition("=")[0]) or "@" in pair


def _literal(secret: str) -> str:
    return "" if _REFERENCE.fullmatch(secret) else secret
