"""MLflow's sqlite file, read with sqlite3 instead of MLflow."""

import sqlite3
from contextlib import closing
from pathlib import Path


class MlflowDatabase:
    """A sqlite file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """Return the rows of a query."""
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(query).fetchall()

    def execute(self, statement: str) -> None:
        """Change the file."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement)
