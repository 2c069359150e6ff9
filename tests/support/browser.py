"""Headless Chromium that opens a page from a file and says what a reader of it sees. Needs the extra `browser`."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.command_line import Call

MEASURE = (Path(__file__).parents[1] / "browser" / "measure.js").read_text(encoding="utf-8")
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium has none for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",  # they take room that a phone's do not take
)
HEIGHTS = {360: 740, 800: 1100, 1400: 900}
"""Widths of a phone, a tablet and a screen, with their heights; in CSS pixels."""
_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
READABLE = 4.5  # the contrast of text that WCAG 2 asks for, level AA
SCHEMES = ("light", "dark")


class Browser:
    """One window.

    Args:
        profile: A new empty folder for what Chromium keeps.
    """

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver  # only these tests have it

        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # named, so that selenium looks for no download
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        self.driver = webdriver.Chrome(options=options, service=service)
        self.command("Network.enable")

    def close(self) -> None:
        """End Chromium and its driver."""
        self.driver.quit()

    def command(self, name: str, **values: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol."""
        answer: dict[str, Any] = self.driver.execute_cdp_cmd(name, values)
        return answer

    def show_as(self, *, width: int, scheme: str = "light", media: str = "", height: int | None = None) -> None:
        """Set the size of the window, the reader's colour scheme and the medium; "" is the screen."""
        size = {"width": width, "height": height or HEIGHTS[width], "deviceScaleFactor": 2, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, page: Path) -> float:
        """Open a page; return the seconds until it was drawn."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # of the page before
        started = time.monotonic()
        self.driver.get(page.resolve().as_uri())
        # the second frame begins when the first is drawn
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return time.monotonic() - started

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns that may call the functions of measure.js."""
        return self.driver.execute_script(f"{MEASURE}\n{script}", *arguments)

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, pointerType="mouse")

    def tap(self, x: float, y: float) -> None:
        """Touch a place of the window with a finger, and lift it."""
        self.command("Emulation.setTouchEmulationEnabled", enabled=True)
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.command("Emulation.setTouchEmulationEnabled", enabled=False)

    def press(self, key: str) -> None:
        """Press a key by its name in JavaScript, and release it."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.command(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=_CODES[key], **text
        )
        self.command("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=_CODES[key])

    def messages(self) -> list[str]:
        """Return what the console has shown since the page was opened: errors, warnings and all else."""
        return [f"{each['level']}: {each['message']}" for each in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the page was opened; once."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = ("Network.requestWillBeSent", "Network.webSocketCreated")
        return [event["params"].get("request", event["params"])["url"] for event in events if event["method"] in sent]

    def picture(self, path: Path, *, width: int) -> None:
        """Write a PNG of the whole page."""
        size = {"width": width, "height": self.run("return document.documentElement.scrollHeight")}
        self.command(
            "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=2 if width < 500 else 1, mobile=False
        )
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
        return base64.b64decode(self.command("Page.printToPDF", **paper)["data"])


class Reader:
    """Writes pages and looks at them as people do: on a phone and on a screen, by day and by night.

    Args:
        browser: The window.
        trainshort: Runs command lines.
        pictures: Where to keep PNGs; None keeps none.
    """

    def __init__(self, browser: Browser, *, trainshort: Call, pictures: Path | None) -> None:
        self.browser, self.trainshort, self.pictures = browser, trainshort, pictures

    def write(self, *runs: str) -> Path:
        """Write the page of one or several runs."""
        answer = self.trainshort("report", *runs, "--out", "page.html")
        assert (answer.code, answer.error) == (0, "page: page.html\n")
        return Path("page.html")

    def look_at(self, page: Path, *, name: str) -> None:
        """Check what holds for every page, at each width and in each scheme; leave it open on a screen, by day.

        Args:
            page: The page.
            name: Of its pictures.
        """
        found: list[str] = []
        lights = {}
        for width in HEIGHTS:
            for scheme in SCHEMES:
                self.browser.show_as(width=width, scheme=scheme)
                self.browser.open(page)
                found += [f"at {width}, {scheme}: {problem}" for problem in self._problems_of(page)]
                lights[scheme] = self.browser.run("return brightness()")
                if self.pictures:
                    self.pictures.mkdir(parents=True, exist_ok=True)
                    self.browser.picture(self.pictures / f"{name}-{width}-{scheme}.png", width=width)
        if not lights["dark"] < 0.05 < 0.8 < lights["light"]:
            found.append(f"as bright as {lights}")
        self.browser.show_as(width=1400)
        self.browser.open(page)
        assert not found, "\n".join([name, *found])

    def _problems_of(self, page: Path) -> Iterator[str]:
        browser = self.browser
        yield from browser.messages()
        yield from (
            f"asks for {each}" for each in browser.requests() if each not in (page.resolve().as_uri(), "data:,")
        )
        yield from browser.run("return sticksOut()")
        yield from browser.run("return misplacedTexts()")
        yield from (
            f"contrast {each:.2f}: {text}" for each, text in browser.run("return contrasts()") if each < READABLE
        )
        for chart in browser.run("return charts()"):
            title = chart["title"]
            if not chart["curves"] or chart["width"] < 200:
                yield f"{title} is empty, or {chart['width']} wide"
            for curve in chart["curves"]:
                if not curve["isFinite"] or not curve["within"]:
                    yield f"{title}: {curve}"
