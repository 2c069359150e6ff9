"""The store that a run is logged to: which one, and the sqlite file of a store without a server.

MLflow creates a sqlite file table by table, in place. Two runs that start together then break each other's tables, and
one that is killed leaves an unusable file. So a file is created under another name and appears whole.
"""

import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from configs.errors import InputError
from configs.files import try_to_lock
from configs.path_text import expand_store
from configs.secrets import uri_secrets, with_references, without_password
from training.tracking.record import RunRecord

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "trainshort"
ARTIFACTS = "mlartifacts"
# where a sqlite file names places of artifacts; older versions of MLflow have the first table alone
_ARTIFACT_PLACES = (
    *(("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "storage_location"), ("model_versions", "source")),
)
_SCHEMES = (
    *("", "file", "http", "https", "databricks", "databricks-uc", "uc"),
    *("sqlite", "mysql", "mssql", "postgresql"),
)


@dataclass(frozen=True)
class Store:
    """An MLflow store.

    Attributes:
        uri: Its URI as configured; may hold a password.
        setting: What to change to use another store.
    """

    uri: str
    setting: str

    @property
    def public_uri(self) -> str:
        """The URI without its secrets."""
        return without_password(self.uri)

    @property
    def file(self) -> Path | None:
        """The absolute path of a sqlite file; None for a server."""
        match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", self.uri)
        if match is None or match[1].startswith((":", "file:")):
            return None
        return Path(unquote(match[1])).absolute()

    @property
    def artifact_location(self) -> str | None:
        """Where a new experiment stores its artifacts: beside a sqlite file, else the server's choice (None)."""
        return (self.file.parent / ARTIFACTS).as_uri() if self.file else None

    def with_passwords(self, environ: Mapping[str, str]) -> str:
        """Return the URI to connect to, with the environment variables that it refers to."""
        return with_references(self.uri, variables=environ)

    def secrets(self, environ: Mapping[str, str]) -> set[str]:
        """Return what no message may show."""
        known = {environ.get(name, "") for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")} - {""}
        return known | uri_secrets(self.with_passwords(environ))


def default_store(run_dir: Path) -> Store:
    """Return the sqlite file beside a run folder."""
    return Store(_file_uri(run_dir.absolute().parent / "mlflow.db"), "track.uri")


def choose_store(uri: str | None, *, run_dir: Path, environ: Mapping[str, str]) -> Store:
    """Return the store of a run: `track.uri`, else MLFLOW_TRACKING_URI, else the sqlite file beside the run folder.

    Args:
        uri: Value of `track.uri`. Copies of it have no password: MLFLOW_TRACKING_URI then gives it, if it names the
            same store.
        run_dir: The run folder.
        environ: The environment.
    """
    given = expand_store(environ.get(STORE_VARIABLE, "").strip())
    if given and (uri is None or (uri == without_password(uri) == without_password(given))):
        return Store(given, STORE_VARIABLE)
    return default_store(run_dir) if uri is None else Store(uri, "track.uri")


def require_known_scheme(store: Store) -> None:
    """Refuse a store that MLflow cannot open because of how its URI begins: a run would be logged nowhere.

    Raises:
        InputError: says how to write it.
    """
    parts = urlsplit(store.uri)
    scheme = parts.scheme.partition("+")[0]
    plugins = () if scheme in _SCHEMES else entry_points(group="mlflow.tracking_store").names
    seen = f"{store.setting} is {store.public_uri}"
    if re.fullmatch(r"[\w.-]+:\d{1,5}/?", store.uri):
        raise InputError(f"{seen}, a host without http: write http://{store.uri}")
    if scheme not in (*_SCHEMES, *plugins):
        raise InputError(
            f"{seen}, but MLflow knows no {scheme}: use http://HOST:PORT, https://HOST, sqlite:///FILE or a database"
        )
    if scheme in ("http", "https") and not parts.netloc:
        raise InputError(f"{seen}, which names no host: write {scheme}://HOST")


def recorded_store(record: RunRecord, *, uri: str | None, run_dir: Path, environ: Mapping[str, str]) -> Store:
    """Return the store that holds a recorded run, wherever later commands are started.

    Args:
        record: The run folder's record.
        uri: Value of `track.uri`, perhaps without its password.
        run_dir: The run folder.
        environ: The environment.
    """
    if record.uri is None:
        return default_store(run_dir)
    variable = expand_store(environ.get(STORE_VARIABLE, "").strip())
    # whatever gave it, the variable is what a later command can change
    given = [Store(text, STORE_VARIABLE) for text in (uri, variable) if text]
    same = [store for store in given if recorded_uri(store, run_dir=run_dir) == record.uri]
    # of two that name the same store, the one with its password
    same.sort(key=lambda store: store.uri == store.public_uri)
    store = same[0] if same else Store(record.uri, STORE_VARIABLE)
    has_moved = store.file is not None and not store.file.exists()
    return given[-1] if has_moved and variable else store


def recorded_uri(store: Store, *, run_dir: Path) -> str | None:
    """Return a store's URI for the record of a run folder: None for the sqlite file beside the folder."""
    if store.file is None:
        return store.public_uri
    return None if store.file == default_store(run_dir).file else _file_uri(store.file)


def create_file(file: Path, *, fill: Callable[[str], None]) -> None:
    """Create a sqlite file with all of MLflow's tables, unless another process creates it first.

    Args:
        file: The file; nothing is done if it has content.
        fill: Creates the tables in the store of a URI.
    """
    if _has_content(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(try_to_lock(file.parent))  # without the lock several may create it, and the first wins
        if _has_content(file):
            return
        temporary = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".mlflow-", dir=file.parent))) / "new.db"
        )
        fill(_file_uri(temporary))
        try:
            os.link(temporary, file)  # unlike a rename, it never replaces a file that another process has created
        except OSError:  # there is a file now, or the file system has no links
            if not _has_content(file):
                temporary.replace(file)


def follow_move(file: Path, *, experiment: str | None, run_id: str | None) -> bool:
    """Point an experiment's artifacts to the folder beside a sqlite file that was moved or copied with it.

    MLflow keeps absolute paths: without this, new artifacts would go to the old place. Return whether it has moved.

    Args:
        file: The sqlite file.
        experiment: The experiment's name; None for that of the run alone.
        run_id: A run whose experiment is meant too.
    Raises:
        sqlite3.Error: the file cannot be read or written.
    """
    here = file.parent / ARTIFACTS
    with closing(sqlite3.connect(file, timeout=30)) as connection, connection:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return False  # MLflow has not filled the file yet
        locations = connection.execute(
            "select distinct artifact_location from experiments "
            "where name = ? or experiment_id in (select experiment_id from runs where run_uuid = ?)",
            (experiment, run_id),
        ).fetchall()
        moved = [(here.as_uri(), location) for (location,) in locations if _has_moved(location, here=here)]
        connection.executemany("update experiments set artifact_location = ? where artifact_location = ?", moved)
        for table, column in _ARTIFACT_PLACES:
            if table in tables:
                connection.executemany(
                    f"update {table} set {column} = ?1 || substr({column}, length(?2) + 1) "
                    f"where substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                    moved,
                )
    return bool(moved)


def _file_uri(file: Path) -> str:
    path = str(file)
    if "?" in path or unquote(path) != path:  # SQLAlchemy ends a path at a `?`, and decodes it
        path = path.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}"


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _has_moved(location: str, *, here: Path) -> bool:
    """Return whether artifacts that MLflow looks for elsewhere are here, or are lost there."""
    parts = urlsplit(location)
    before = Path(unquote(parts.path))
    if parts.scheme not in ("file", "") or before.name != ARTIFACTS or before == here:
        return False
    if before.parent.exists() and before.parent.samefile(here.parent):  # one folder by two names
        return False
    return here.exists() or not before.exists()
