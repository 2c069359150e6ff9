"""Find the text that `--text` means among those that a run was evaluated on. Imports no torch."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from training.evaluation.kept import other_precision, read_report, text_name


@dataclass(frozen=True)
class WantedText:
    """A text as the user names it: its label, a file, or the name of a file.

    Attributes:
        name: What was given.
        sha256: Hash of the text, if a file is there.
    """

    name: str
    sha256: str | None

    @classmethod
    def of(cls, name: str) -> "WantedText":
        """Return the text of this name.

        Raises:
            InputError: it is a file that cannot be read as text.
        """
        path = Path(name)
        if not path.is_file():
            return cls(name, None)
        from data_pipeline.sources import file_chunks  # here: it takes a third of a second to import

        text = hashlib.sha256()
        for chunk in file_chunks(path, separator=None):
            text.update(chunk.text.encode())
        return cls(name, text.hexdigest())

    def find(self, reports: Mapping[str, Path]) -> Path | None:
        """Return the report on this text; None if there is none.

        A label counts before the file's content, then its path. A bare name is enough where there is no such file. Of
        files with one content the one with its path is taken, else any.

        Args:
            reports: The reports of a run by the label of their text.
        Raises:
            InputError: the run has several texts of this name.
        """
        if self.name in reports:
            return reports[self.name]
        contents: dict[str, dict[str, Any]] = {}
        for label, path in reports.items():
            with suppress(InputError):  # a broken one, which may be of any text
                contents[label] = read_report(path)
        place = str(Path(self.name).resolve())
        same_content = [label for label, report in contents.items() if self.sha256 == report.get("text_sha256", "")]
        same_path = [label for label, report in contents.items() if report.get("text_path") == place]
        same_name = [label for label, report in contents.items() if text_name(report) == self.name]
        same_content.sort(key=lambda label: (other_precision(contents[label]) is not None, label not in same_path))
        labels = same_content[:1] or same_path or (same_name if self.sha256 is None else [])
        # One text may have a report per precision; the others have labels of their own.
        labels = [label for label in labels if other_precision(contents[label]) is None] or labels
        if len(labels) > 1:
            raise InputError(
                f"--text {self.name} is the name of several texts: give one of {', '.join(sorted(labels))}"
            )
        return reports[labels[0]] if labels else None
