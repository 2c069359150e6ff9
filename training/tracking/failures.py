"""Errors of MLflow: whether they may pass by themselves, their cause, and what to do."""

import re
import sqlite3
from collections.abc import Iterator

from training.tracking.store import STORE_VARIABLE, Store

_LONGEST_REASON = 600
# Codes of MLflow for what may pass: the server restarts, is overloaded, or another start changes the same thing now.
_PASSING_CODES = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
    "ABORTED",
    "RESOURCE_CONFLICT",
    "RESOURCE_ALREADY_EXISTS",
    "ALREADY_EXISTS",
}
_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_REFUSED_FILE = {400, 413, 414}
_NO_ACCESS = re.compile(r"UNAUTHENTICATED|CUSTOMER_UNAUTHORIZED|PERMISSION_DENIED|\b40[137]\b|password", re.IGNORECASE)
_WRONG_URL = {"InvalidURL", "InvalidSchema", "MissingSchema", "InvalidUrlException"}
# of sqlalchemy, whatever the driver: a locked database, a lost connection, tables that another start creates now
_PASSING_DATABASE = {"OperationalError", "InterfaceError", "IntegrityError", "ProgrammingError", "TimeoutError"}


def may_pass(error: Exception) -> bool:
    """Return whether a retry may succeed: no connection, a locked database, a server that restarts or is busy."""
    links = list(_chain(error))
    names = {type(link).__name__ for link in links}
    # a deleted file and a package that is not installed stay as they are
    if isinstance(error, FileNotFoundError | ImportError) or names & _WRONG_URL:
        return False
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUS
    if any(_is_passing_database_error(link) for link in links):
        return True
    code = getattr(error, "error_code", None)
    return code in _PASSING_CODES if code is not None else isinstance(error, OSError)


def is_about_file(error: Exception) -> bool:
    """Return whether an error is about one file and not about the store of artifacts: it is gone, or too large."""
    is_gone = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return is_gone or _http_status(error) in _REFUSED_FILE


def reason_of(error: Exception) -> str:
    """Return the cause of an error in one line: MLflow's own message names it last, after the request's address."""
    cause: BaseException = error
    for link in _chain(error):
        # a KeyError on the way is how a library looks something up
        if type(link).__module__ != "builtins" or isinstance(link, OSError | ImportError):
            cause = link
    text = " ".join(str(cause).split()) or type(cause).__name__
    half = _LONGEST_REASON // 2
    return text if len(text) <= _LONGEST_REASON else f"{text[:half]} ... {text[-half:]}"


def advice_on(error: Exception, *, store: Store) -> str:
    """Return what to do about an error."""
    if isinstance(error, ImportError):
        return f"install the package, or change {store.setting}"
    if type(error) is LookupError:  # a recorded run's store or the run is gone, as beside a copy of a run folder
        return f"bring it back, or change {store.setting}"
    if _NO_ACCESS.search(f"{getattr(error, 'error_code', '')} {reason_of(error)}"):
        return (
            "give user and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            f"or in the URI of {STORE_VARIABLE}"
        )
    if store.file is not None:
        return f"check the folder {store.file.parent} and its disk, or change {store.setting}"
    if "://" not in store.uri or store.uri.startswith("file:"):
        return f"change {store.setting}, for example to sqlite:///mlflow.db"
    return f"check that the server runs, or change {store.setting}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, the first cause last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status of a server's answer that is not JSON; MLflow names some of them only in words."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    named = re.search(r"failed with error code (\d{3})", str(error))
    if isinstance(status, int):
        return status
    return int(named[1]) if named else None


def _is_passing_database_error(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError):
        return True
    kind = type(error)
    if kind.__module__.startswith("alembic"):
        return "Online migration expected" in str(error)  # another start migrates the database now
    return kind.__module__.startswith("sqlalchemy") and kind.__name__ in _PASSING_DATABASE
