"""Secrets of a run file: the one place that decides what may be printed, written to disk or sent to MLflow.

A tracking URI may hold a password, and `slurm.env` a token. The schema serializes both without their secrets, so the
run folder, checkpoints and MLflow get only what this module lets through; messages pass through `hide_secrets`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote, unquote_plus

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"passw|passphrase|pwd|secret|credential|token(?!iz)|signature|(?:api|access|private|account)[_-]?key"
    r"|connection[_-]?string|(?:^|[_.-])(?:pass|pw|pat|sas|jwt|bearer|creds|cookie|authorization|auth|sig|key)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(?:bearer|basic) \S|(?:^|;)\s*(?:pwd|password|accountkey|sharedaccess\w+)=", re.IGNORECASE
)
# How a URI begins whose slashes are mistyped: http(s) with any slashes, others before me:pw@ alone (C:/a is a path).
_HTTP = r"[Hh][Tt][Tt][Pp][Ss]?(?::/+|//)"
_MISTYPED = r"[A-Za-z][\w+.-]*(?::/|//)"
# What looks like a secret in any text: the user of a URI, a parameter of a URI, a variable such as HF_TOKEN, a header
# and the user of curl. A reference such as $HF_TOKEN is no secret, nor is $oauthtoken, the user of every NGC account.
_USER = re.compile(
    r"(\b(?:[A-Za-z][\w+.-]*://|" + _HTTP + r"))"
    r"(?![^\s/@]*\$\{\w+\}@|\$oauthtoken@)(?:[^\s/@]+|[^\s/@:]*:[^\s@'\"]+)@"
)
_MISTYPED_USER = re.compile(
    r"(\b" + _MISTYPED + r"|(?<![\w:/.])//|(?<![^\s'\"=\[{(,])(?=[^\s/@:;=]{1,64}:[^\s/@]+@(?!sha\d+:)[\w\[]))"
    r"(?![^\s/@]*\$\{\w+\}@)[^\s/@:'\"]*:[^\s@'\"]+@"
)
_VALUE = r"[^\s&'\",}\]$`]+"
_NAMED = re.compile(r"((?:[?&;]([\w.%-]+)=|\b([A-Z][A-Z0-9_]*)['\"]?\s*[=:]\s*['\"]?))(" + _VALUE + ")")
# Names in small letters are common in code and messages: only those that end as a secret does, and no word such as key
# or eos_token.
_ASSIGNED = re.compile(
    r"(\b\w*(?:passw(?:or)?d|passphrase|pwd|secret|credentials?|signature|(?:api|access|private|account)_?key"
    r"|(?<!per_)(?<!unk_)(?<!pad_)(?<!eos_)(?<!bos_)token|connection_?string|authorization"
    r"|_(?:pass|pw|pat|sas|jwt|bearer|creds|cookie|auth|sig|key)|\b(?:pw|jwt|bearer))"
    r"=['\"]?)" + _VALUE,
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token|digest)\s+)?"
    r"|\bbearer\s+|\bbasic\s+(?=\S*(?-i:[A-Z\d=])))(?!(?:bearer|basic|token|digest)\s)" + _VALUE,
    re.IGNORECASE,
)
_CURL_USER = re.compile(r"((?<!\S)(?:-u|--(?:proxy-)?user)[\s=]*['\"]?(?!\d+:\d+\b)[^\s:/'\"-][^\s:/'\"]*:)" + _VALUE)
# Whoever has the address of a webhook may post there: Slack's, Zapier's, Discord's, Teams', Telegram's, Mattermost's.
_WEBHOOK = re.compile(
    r"(\b(?:hooks\.(?:slack(?:-gov)?|zapier)\.com/[a-z]+/|discord(?:app)?\.com/api/(?:v\d+/)?webhooks/"
    r"|webhook\.office\.com/\w+/|api\.telegram\.org/bot|(?<=://)[^\s/]+/hooks/(?=[a-z\d]{26}\b)))"
    r"(?![^\s'\"]*\$)[^\s'\"?]+",
    re.IGNORECASE,
)
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
        # me:pw@host and https:/me:pw@host are not URIs, but their password must not be shown either
        start = re.match(rf"{_HTTP}|[^/@?]*://|(?:{_MISTYPED}|//)(?=[^/@:]*:.*@)|(?=[^/@]*:[^/]*@)", text)
        if start is None:
            return cls("", "", text, ())  # a path
        scheme, rest = start[0], text[start.end() :]
        # The user ends at the last @, since a password may hold / and ? as written. Without a host, an @ is in a path.
        head, _, query = rest.partition("?")
        has_user = not rest.startswith("/") and ("@" in head or (":" in head and "@" in query))
        user, _, address = (head if "@" in head else rest).rpartition("@") if has_user else ("", "", head)
        if has_user and "@" not in head:
            address, _, query = address.partition("?")
        if re.match(_HTTP, scheme):
            address, query = address.partition("#")[0], query.partition("#")[0]  # a fragment is never sent
        return cls(scheme, user, address, tuple(filter(None, re.split("[&;]", query))))

    @property
    def secret(self) -> str:
        """The password, or a user without one, which is then a token; empty if it is a reference such as ${PW}."""
        name, _, password = self.user.partition(":")
        return "" if self.user == "$oauthtoken" else _literal(password or name)

    @property
    def secret_parameters(self) -> tuple[str, ...]:
        pairs = (*self.address.split(";")[1:], *self.parameters)  # https://host;password=pw is mistyped
        return tuple(pair for pair in pairs if _literal(pair.partition("=")[2]) and _is_secret_pair(pair))


def is_secret_name(name: str) -> bool:
    """Return whether a variable or a URI parameter of this name holds a secret, as HF_TOKEN does."""
    return _SECRET_NAME.search(unquote(name)) is not None


def without_password(uri: str) -> str:
    """Return a URI without user, password and secret parameters: https://me:pw@host/x becomes https://host/x.

    References to environment variables stay, as in https://me:${PW}@host.
    """
    parts = _Uri.of(uri)
    user = f"{parts.user}@" if parts.user and not parts.secret else ""
    hidden = parts.secret_parameters
    public = [pair for pair in parts.parameters if pair not in hidden]
    address, *others = parts.address.split(";")
    address = ";".join([address, *(pair for pair in others if pair not in hidden)])
    return parts.scheme + user + address + (f"?{'&'.join(public)}" if public else "")


def uri_secrets(uri: str) -> set[str]:
    """Return the secrets of a URI, as written and decoded."""
    parts = _Uri.of(uri)
    secrets = [parts.secret, *(pair.partition("=")[2] for pair in parts.secret_parameters)]
    secrets += [value for pair in parts.secret_parameters for value in _inner_secrets(pair.partition("=")[2])]
    # a library may take a / or ? in a password for the end of the host, and name what comes before it
    secrets += [piece for piece in re.split("[/?#@]", parts.secret) if len(piece) > 3]
    return {text for secret in secrets for text in (secret, unquote(secret)) if text}


def with_references(uri: str, *, variables: Mapping[str, str]) -> str:
    """Return a URI with the variables that it refers to, percent-encoded; one that is not set stays as written."""
    return _REFERENCE.sub(lambda match: quote(variables[match[1]], safe="") if match[1] in variables else match[0], uri)


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable is a secret by its name, holds one in its value, or was hidden before."""
    if is_secret_name(name) or value == HIDDEN or _SECRET_VALUE.search(value):
        return True
    return without_password(value) != value or hide_secrets(value) != value


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
    text = _MISTYPED_USER.sub(r"\1", _USER.sub(r"\1", text))
    for pattern in (_HEADER, _CURL_USER, _WEBHOOK):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _NAMED.sub(_without_value, text))


def _without_value(match: re.Match[str]) -> str:
    is_secret = is_secret_name(match[2] or match[3]) or _inner_secrets(match[4])
    return f"{match[1]}{HIDDEN}" if is_secret else match[0]


def _is_secret_pair(pair: str) -> bool:
    name, _, value = pair.partition("=")
    return is_secret_name(name) or "@" in pair or bool(_inner_secrets(value))


def _inner_secrets(value: str) -> list[str]:
    """Return the secrets in a value that is a list of pairs itself, such as an ODBC connection string."""
    pairs = re.findall(r"(?:^|[;&])\s*([^=;&\s]+)\s*=\s*([^;&]+)", unquote_plus(value))
    return [secret for name, secret in pairs if is_secret_name(name) and _literal(secret)]


def _literal(secret: str) -> str:
    return "" if _REFERENCE.fullmatch(secret) else secret
