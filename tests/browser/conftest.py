"""Fixtures of the tests that open pages in Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, Reader
from tests.support.command_line import Call


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that keeps pictures."""
    parser.addoption("--pictures", type=Path, metavar="DIR", help="write PNGs of the pages here, to look at")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One window for all tests."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reader(browser: Browser, trainshort: Call, here: Path, request: pytest.FixtureRequest) -> Reader:
    """A reader of pages in the test's working directory."""
    return Reader(browser, trainshort=trainshort, pictures=request.config.getoption("--pictures", default=None))
