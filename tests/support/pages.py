"""Read the project's Markdown pages: blocks of code, the commands in them, links, and code inside of sentences."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support.house.source import HOUSE

STARTERS = ("trainshort", "srun", "torchrun")
# A line of a block that begins with one of these is a command.
PROGRAMS = (
    *(*STARTERS, "make", "sbatch"),
    *("python", "python3", "python3.11", "pip", "git", "mlflow", "vllm", "llama-completion", "llama-server", "curl"),
    *(".", "cd", "export", "touch", "tail", "ls", "cp", "rm"),
)
_FENCE = re.compile(r"```(\w*)\s*")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"#{1,6} +(.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        place: Page and line of its first line.
        language: The word behind the fence; empty if there is none.
        lines: Its lines.
    """

    place: str
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return its lines as one text."""
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        place: Page and line.
        words: Program and arguments, without assignments before them, pipes and redirections.
        fails: Whether the page shows an error of it.
    """

    place: str
    words: tuple[str, ...]
    fails: bool

    def __str__(self) -> str:
        """Return the place and the command line."""
        return f"{self.place}: {shlex.join(self.words)}"

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """Return the arguments of `trainshort`, also behind srun or torchrun; None for another program."""
        if self.words[0] not in STARTERS or "trainshort" not in self.words:
            return None
        return self.words[self.words.index("trainshort") + 1 :]


@dataclass(frozen=True)
class Page:
    """One Markdown file.

    Attributes:
        name: Its path inside the repository.
        text: Its content.
    """

    name: str
    text: str

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Return the fenced blocks."""
        blocks, opened, language, lines = [], 0, "", list[str]()
        for number, line in enumerate(self.text.splitlines(), start=1):
            fence = _FENCE.fullmatch(line.strip())
            if opened and fence:
                blocks.append(Block(f"{self.name}:{opened + 1}", language, tuple(lines)))
                opened = 0
            elif fence:
                opened, language, lines = number, fence[1], []
            elif opened:
                lines.append(line)
        assert not opened, f"{self.name}:{opened} a block is not closed"
        return tuple(blocks)

    @cached_property
    def prose(self) -> str:
        """Return the text without its blocks, the lines in their places."""
        inside, lines = False, []
        for line in self.text.splitlines():
            fence = _FENCE.fullmatch(line.strip())
            lines.append("" if inside or fence else line)
            inside = inside != bool(fence)
        return "\n".join(lines)

    @property
    def code(self) -> list[str]:
        """Return the code inside of sentences and tables."""
        return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)]

    @property
    def links(self) -> list[str]:
        """Return the targets of links and images."""
        return _LINK.findall(re.sub(r"`[^`\n]*`", "", self.prose))

    @property
    def anchors(self) -> set[str]:
        """Return the anchors that GitHub gives the headings."""
        anchors = set[str]()
        for line in self.prose.splitlines():
            if heading := _HEADING.fullmatch(line):
                words = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
                numbered = (words if n == 0 else f"{words}-{n}" for n in range(100))
                anchors.add(next(anchor for anchor in numbered if anchor not in anchors))
        return anchors

    def commands(self) -> Iterator[Command]:
        """Yield the commands of its blocks, in their order."""
        for block in self.blocks:
            yield from commands_of(block)

    def commands_elsewhere(self) -> Iterator[str]:
        """Yield lines that look like commands, but stand where no test would find them."""
        for block in self.blocks:
            if block.language not in ("sh", "console"):
                yield from (f"{block.place}: {line}" for line in block.lines if _begins_a_command(line))
        for number, line in enumerate(self.prose.splitlines(), start=1):
            if line.startswith("    ") and _begins_a_command(line):
                yield f"{self.name}:{number}: {line.strip()}"


def read_pages(*patterns: str) -> tuple[Page, ...]:
    """Return the pages of the repository that match patterns, sorted."""
    files = sorted({file for pattern in patterns for file in HOUSE.glob(pattern)})
    return tuple(Page(file.relative_to(HOUSE).as_posix(), file.read_text(encoding="utf-8")) for file in files)


def page_of(target: str, *, page: Page) -> Path:
    """Return the file that a relative link of a page names, which is not the page itself."""
    return ((HOUSE / page.name).parent / target.partition("#")[0]).resolve()


def _begins_a_command(line: str) -> bool:
    words = line.split()
    return bool(words) and (words[0] == "$" or words[0] in PROGRAMS)


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a block: each line of `sh`, each line behind a `$` of `console`."""
    page, first = block.place.rsplit(":", 1)
    lines = [line.removeprefix("$ ") if line.startswith("$ ") else "" for line in block.lines]
    if block.language == "sh":
        lines = list(block.lines)
    elif block.language != "console":
        return
    continued = ""
    for offset, line in enumerate(lines):
        if line.endswith("\\"):
            continued += line[:-1]
            continue
        after = block.lines[offset + 1 :]
        fails = block.language == "console" and bool(after) and after[0].startswith("error: ")
        for words in _split(continued + line):
            yield Command(f"{page}:{int(first) + offset}", words, fails)
        continued = ""


def _split(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command of a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, cut = list[str](), False
    for token in [*lexer, "&&"]:
        if token in ("&&", ";"):
            words = words[next((n for n, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words)) :]
            if words:
                yield tuple(words)
            words, cut = [], False
        elif token and set(token) <= set("|<>&"):
            cut = True  # what follows is another program, or a file
        elif not cut:
            words.append(token)
