"""A visitor of the page in a real browser: what is pressed, picked, written, uploaded and seen."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.service import Service  # noqa: E402 (skipped where it is missing)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = (390, 844), (1280, 900)
PATIENCE_SECONDS = 60
TABS = ("Teacher", "Labels", "Search", "Ask")
# Milliseconds from a visitor's next action until something first shows that the page works on it.
WATCH = """
window.waited = null;
let start = null;
for (const kind of ["click", "input", "keydown"])
    window.addEventListener(kind, () => { start ??= performance.now(); }, {capture: true, once: true});
const shows = e => !e.classList.contains("hide") && +getComputedStyle(e).opacity > 0
    && e.getClientRects().length && e.getBoundingClientRect().height > 10 && e.innerText.trim();
const look = () => {
    if (start !== null && [...document.querySelectorAll("[data-testid=status-tracker]")].some(shows))
        window.waited = performance.now() - start;
    else requestAnimationFrame(look);
};
look();
"""
# Each text that can be seen, with its size relative to the page's body.
SIZES = """
const body = parseFloat(getComputedStyle(document.body).fontSize), found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (text && element.getClientRects().length && !["SCRIPT", "STYLE"].includes(element.tagName))
        found.push([text, parseFloat(getComputedStyle(element).fontSize) / body]);
}
for (const field of document.querySelectorAll("input, textarea"))
    if (field.getClientRects().length)
        found.push([field.value, parseFloat(getComputedStyle(field).fontSize) / body]);
return found;
"""


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver, url: str, pictures: Path):
        self.driver, self.url, self.pictures = driver, url, pictures

    def open(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(self.url)
        self.wait(lambda: self.count("#examples img"))

    def wait(self, condition):
        try:
            return WebDriverWait(self.driver, PATIENCE_SECONDS, poll_frequency=0.05).until(lambda _: condition())
        except Exception:
            self.keep_picture("failed")
            raise

    def see(self, selector: str, script: str = "") -> list:
        """What can be seen of it, or what a script makes of that; in one step, since the page redraws as it likes."""
        visible = "[...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
        return self.driver.execute_script(f"return {visible}{script}", selector)

    def count(self, selector: str) -> int:
        return self.see(selector, ".length")

    def read(self, selector: str) -> str:
        return self.see(selector, ".map(e => e.innerText).join(' ')")

    def list_sources(self, selector: str) -> list[str]:
        return self.see(selector, ".map(e => e.src)")

    def press(self, text: str, selector: str = "button.lg") -> None:
        click = f".filter(e => e.innerText.trim() == '{text}').slice(0, 1).map(e => e.click()).length"
        self.wait(lambda: self.see(selector, click))

    def turn_to(self, tab: str) -> None:
        self.press(tab, "button[role=tab]")
        self.wait(lambda: self.read("button[role=tab][aria-selected=true]") == tab)

    def pick(self, gallery: str, place: int) -> None:
        click = f".slice({place}, {place + 1}).map(e => e.click()).length"
        self.wait(lambda: self.see(f"{gallery} button.thumbnail-item", click))

    def write(self, text: str) -> None:
        self.wait(lambda: self.count("textarea, input[type=text]"))
        box = self.see("textarea, input[type=text]")[0]
        box.clear()
        box.send_keys(text)

    def upload(self, path: Path, is_taken: bool = True) -> None:
        self.clear_clip()
        field = self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#clip input[type=file]"))[0]
        field.send_keys(str(path))
        if is_taken:
            self.wait_for_clip(path.name)

    def clear_clip(self) -> None:
        self.see("#clip button[aria-label=Clear]", ".map(e => e.click())")
        self.wait(lambda: not self.count("#clip video"))

    def wait_for_clip(self, name: str) -> None:
        self.wait(lambda: any(source.endswith(f"/{name}") for source in self.list_sources("#clip video")))

    def read_problem(self, part: str) -> str:
        """The messages that popped up, once one has these words; they are closed."""
        self.wait(lambda: part in self.read("[data-testid=toast-body]"))
        text = self.read("[data-testid=toast-body]")
        self.see(".toast-close", ".map(e => e.click())")
        self.wait(lambda: not self.count("[data-testid=toast-body]"))
        return text

    def keep_picture(self, name: str) -> None:
        """Write a picture of the page from top to bottom."""
        self.driver.execute_script("window.scrollTo(0, 0)")
        options = {"captureBeyondViewport": True, "format": "png"}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))

    def check_requests(self) -> int:
        """No request since the last check went beyond this machine, and no script failed; how many there were."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            message["params"]["request"]["url"] for message in messages if message["method"].endswith("WillBeSent")
        ]
        assert not [url for url in urls if not url.startswith((self.url, "data:", "blob:"))]
        # What Gradio writes to the console itself is left out: it minds that a page is left while it streams.
        entries = [entry for entry in self.driver.get_log("browser") if entry["source"] != "console-api"]
        assert not [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return len(urls)

    def time_waiting(self, act: Callable[[], object]) -> float:
        """Milliseconds from an action until the page shows that it works on it, by the browser's clock."""
        self.driver.execute_script(WATCH)
        act()
        return self.wait(lambda: self.driver.execute_script("return window.waited"))

    def wait_until_idle(self) -> None:
        busy = "[data-testid=status-tracker]:not(.hide)"
        self.wait(lambda: not self.driver.execute_script(f"return document.querySelectorAll('{busy}').length"))

    def measure_texts(self) -> dict[str, float]:
        """Each text that can be seen: how many times as large as the page's body it is."""
        return dict(self.driver.execute_script(SIZES))

    def is_too_wide(self) -> bool:
        return self.driver.execute_script("return document.scrollingElement.scrollWidth > window.innerWidth")


def open_browser() -> Iterator:
    """A browser without a window, closed at the end; skips where there is none."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    chromedriver = shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()
