"""The pages name only what exists: files, headings, keys, options, commands; no command of theirs is left out of the
tests."""

import ast
import importlib.util
import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from configs.errors import InputError, LostPeers, MachineError, TrainshortError
from configs.load import check_run
from configs.schema import RunConfig
from configs.study import Study, load_study
from launch.cli import UsageError, app
from tests.support.house.source import FLOORS, HOUSE, Source, sources_of
from tests.support.pages import Command, Page, page_of, read_pages
from tests.support.small_run import small_run

PAGES = read_pages("*.md", "docs/*.md")
LINKED = read_pages("*.md", "docs/**/*.md", ".github/**/*.md")
# What was changed or measured then may be called otherwise today.
HISTORY = ("CHANGELOG.md", "docs/experiments.md")
TODAY = tuple(page for page in PAGES if page.name not in HISTORY)
# Programs whose command lines say nothing about ours.
OTHER_PROGRAMS = (
    *(".", "cd", "cp", "export", "ls", "rm", "tail", "touch"),
    *("curl", "git", "llama-completion", "llama-server", "mlflow", "pip", "pre-commit", "tensorboard", "vllm"),
)
OPTIONS_OF_OTHERS = {
    "--context-window": "fairseq",
    "--exclude": "sbatch",
    "--exclusive": "sbatch",
    "--export": "sbatch",
    "--gpu-bind": "srun",
    "--logdir": "TensorBoard",
    "--long": "zstd",
    "--hf-overrides": "vLLM",
    "--kv-cache-memory-bytes": "vLLM",
    "--max-model-len": "vLLM",
    "--tokens-per-sample": "fairseq",
}
ERRORS = (InputError, MachineError, LostPeers)
NOT_OURS = "trainshort: command not found"


def ids(pages: Sequence[Page]) -> list[str]:
    return [page.name for page in pages]


def options_of(command: Any) -> set[str]:
    """Return the options of a command and of the commands below it."""
    own = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()), ("--help", "-h"))


def find_command(words: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the command that words begin with, and the other words."""
    command, rest = get_command(app), list(words)
    while rest and rest[0][0] != "-" and getattr(command, "commands", None):
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def parse(command: Command) -> None:
    """Check that a command exists and that it takes these options."""
    program, *words = command.words
    program = program.rpartition("/")[2]
    if command.arguments is not None:
        found, rest = find_command(command.arguments)
        if {"--help", "--version"} & set(rest):
            assert {word for word in rest if word[0] == "-"} <= options_of(found)
        else:
            found.make_context("trainshort", rest)
    elif program == "make":
        makefile = (HOUSE / "Makefile").read_text(encoding="utf-8")
        assert set(words) <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    elif program.startswith("python"):
        is_module = words[0] == "-m" and words[1].partition(".")[0] not in OTHER_PROGRAMS
        assert importlib.util.find_spec(words[1]) if is_module else words[0] == "-m" or (HOUSE / words[0]).is_file()
    else:
        assert program in OTHER_PROGRAMS, f"{program} is no program that pages call"


def unknown_commands(page: Page) -> Iterator[str]:
    for command in page.commands():
        try:
            parse(command)
        except (AssertionError, ModuleNotFoundError, TrainshortError, UsageError) as error:
            yield f"{command}: {error}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_command_of_a_page_exists(page: Page) -> None:
    assert list(unknown_commands(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_stand_in_blocks_that_tests_read(page: Page) -> None:
    assert list(page.commands_elsewhere()) == []


def broken_links(page: Page) -> Iterator[str]:
    for target in page.links:
        if target.startswith(("https://", "mailto:")):
            continue
        if target[0] == "#":
            if target[1:] not in page.anchors:
                yield target
            continue
        file, anchor = page_of(target, page=page), target.partition("#")[2]
        exists = file.exists() and file.is_relative_to(HOUSE)
        if exists and anchor:
            exists = anchor in Page(target, file.read_text(encoding="utf-8")).anchors
        if not exists:
            yield target


@pytest.mark.parametrize("page", LINKED, ids=ids(LINKED))
def test_links_lead_to_files_and_headings(page: Page) -> None:
    assert list(broken_links(page)) == []


def unknown_keys(page: Page) -> Iterator[str]:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for code in page.code:
        match = re.fullmatch(rf"({'|'.join(sections)})\.(\w+)([ =:.\[].*)?", code)
        if match and match[2] not in ("yaml", "safetensors", *sections[match[1]].model_fields):
            yield code


# There, `model` is an object of Python.
NAMING_KEYS = tuple(page for page in TODAY if page.name != "docs/python.md")


@pytest.mark.parametrize("page", NAMING_KEYS, ids=ids(NAMING_KEYS))
def test_keys_that_a_page_names_are_in_the_schema(page: Page) -> None:
    assert list(unknown_keys(page)) == []


@pytest.mark.parametrize("page", TODAY, ids=ids(TODAY))
def test_yaml_of_a_page_is_legal(page: Page, tmp_path: Path) -> None:
    for block in page.blocks:
        values = yaml.safe_load(block.text) if block.language == "yaml" else {}
        if "runs" in values:
            (tmp_path / "study.yaml").write_text(block.text, encoding="utf-8")
            load_study(str(tmp_path / "study.yaml"))
        else:  # a part of a run file
            check_run(small_run(values), name=block.place)


def test_the_page_on_studies_has_all_their_keys() -> None:
    (page,) = (page for page in PAGES if page.name == "docs/studies.md")
    keys = [line.split("`")[1] for line in page.prose.splitlines() if line.startswith("| `")]
    assert set(Study.model_fields) <= set(keys)


def unknown_options(page: Page) -> Iterator[str]:
    known = options_of(get_command(app))
    for code in page.code:
        words = code.replace("=", " ").split()
        ours = words[0] == "trainshort"
        if ours or words[0][:2] == "--":
            names = list(itertools.takewhile(re.compile("[a-z|]+").fullmatch, words[1:] if ours else []))
            command, _ = find_command([name.split("|")[0] for name in names[:2]]) if ours else (None, [])
            for option in filter(re.compile(r"--[a-z][a-z-]*").fullmatch, words):
                if option not in (options_of(command) if ours else known) and option not in OPTIONS_OF_OTHERS:
                    yield f"{code}: {option}"


@pytest.mark.parametrize("page", TODAY, ids=ids(TODAY))
def test_options_that_a_page_names_exist(page: Page) -> None:
    assert list(unknown_options(page)) == []


BAD_PAGE = """
# Heading

Set `train.nosuch: 1` or `model.heads`, with `--nosuch` or `trainshort train --lengths 8`; see [a](README.md#nowhere),
[b](nofile.md), [c](#heading) and [d](https://example.com).

    trainshort check indented.yaml

```text
$ trainshort check elsewhere.yaml
```

```sh
trainshort nosuch && trainshort check my.yaml --nosuch
trainshort train my.yaml --ranks 2 \\
    --nosuch > file   # a comment
unknown-program
srun -n 2 trainshort train my.yaml --dry
```

```console
$ trainshort runs
trainshort nosuch: this is output
```
"""


def test_what_does_not_exist_is_found_on_a_page() -> None:
    page = Page("docs/page.md", BAD_PAGE)
    assert list(unknown_keys(page)) == ["train.nosuch: 1"]
    assert list(unknown_options(page)) == ["--nosuch: --nosuch", "trainshort train --lengths 8: --lengths"]
    assert list(broken_links(page)) == ["README.md#nowhere", "nofile.md"]
    assert [line.rpartition(" ")[2] for line in page.commands_elsewhere()] == ["elsewhere.yaml", "indented.yaml"]
    assert len(list(page.commands())) == 6
    found = [line.partition(": ")[0].removeprefix("docs/page.md:") for line in unknown_commands(page)]
    assert found == ["14", "14", "16", "17", "18"]


def message_fragments() -> str:
    """Return the fixed parts of all texts in the code, one a line."""
    sources = (*sources_of(*FLOORS), Source("trainshort.py", (HOUSE / "trainshort.py").read_text(encoding="utf-8")))
    nodes = [node for source in sources for node in source.nodes]
    return "\n".join(str(node.value) for node in nodes if isinstance(node, ast.Constant))


def test_messages_of_the_troubleshooting_page_exist() -> None:
    (page,) = read_pages("docs/troubleshooting.md")
    said, missing = message_fragments(), []
    first_cells = [line.split("|")[1] for line in page.text.splitlines() if line.startswith("| ")]
    for code in itertools.chain.from_iterable(re.findall("`([^`]+)`", cell) for cell in first_cells):
        # between dots, and capitals that stand for values
        fragments = [part.strip() for part in re.split(r"\.\.\.|\b[A-Z]\b|\btraining\b(?= tokens)", code)]
        missing += [(code, part) for part in fragments if part not in said and code != NOT_OURS]
    assert missing == []


def test_exit_codes_of_all_errors_are_explained() -> None:
    command_line, troubleshooting = read_pages("docs/command-line.md", "docs/troubleshooting.md")
    codes = command_line.text.partition("exit code: ")[2].partition("\n\n")[0].split(" · ")
    explained = {int(code.split()[0]) for code in codes}
    rows = {int(code) for code in re.findall(r"^\| (\d+) \| ", troubleshooting.text, re.MULTILINE)}
    assert explained == rows == {0, 130, *(error.exit_code for error in (TrainshortError, *ERRORS))}


def test_the_readme_leads_to_every_page_and_stays_short() -> None:
    (readme,) = read_pages("README.md")
    linked = {target.partition("#")[0] for target in readme.links}
    assert [page.name for page in PAGES if page.name not in (*linked, "README.md")] == []
    assert len(readme.text.splitlines()) < 200


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((HOUSE / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)
    assert citation["license"] == project["license"]


def test_issue_forms_are_those_that_github_reads() -> None:
    forms = sorted((HOUSE / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
    assert len(forms) == 2
    for file in forms:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), file
        fields = [item for item in form["body"] if item["type"] != "markdown"]
        assert len({item["id"] for item in fields}) == len(fields) > 0, file
        assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in fields), file
