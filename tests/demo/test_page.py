"""The page in a real browser, at the width of a phone and of a desk: what a visitor does, reads and cannot break."""

import json
import os
import shutil
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.service import Service  # noqa: E402 (skipped where it is missing)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests.demo.conftest import LABELS  # noqa: E402
from umt_hf.demo import app  # noqa: E402
from umt_hf.demo.settings import DemoSettings  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = (390, 844), (1280, 900)
PATIENCE_SECONDS = 60
QUERY = "a red circle moving left"


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver, url: str, pictures: Path):
        self.driver, self.url, self.pictures = driver, url, pictures

    def open(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(self.url)
        self.wait(lambda: self.count("#examples img") == 5)

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

    def upload(self, path: Path) -> None:
        self.see("#clip button[aria-label=Clear]", ".map(e => e.click())")
        field = self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#clip input[type=file]"))[0]
        field.send_keys(str(path))
        self.wait_for_clip(path.name)

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
        self.driver.execute_script("window.scrollTo(0, 0)")
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))

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

    def is_too_wide(self) -> bool:
        return self.driver.execute_script("return document.scrollingElement.scrollWidth > window.innerWidth")


@pytest.fixture(scope="module")
def driver():
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


@pytest.fixture(scope="module")
def served_page(driver, settings, tmp_path_factory):
    demo = app.launch_demo(settings, block=False)
    yield Page(driver, demo.local_url, tmp_path_factory.mktemp("pictures"))
    demo.close()


@pytest.fixture
def page(served_page):
    yield served_page
    served_page.check_requests()


def test_a_visit_on_a_phone(page, models, clips):
    page.open(PHONE)
    page.upload(clips / "00002.mp4")
    page.press("Classify")
    page.wait(lambda: all(label in page.read("#labels") for label in LABELS))
    best = models.classifier.classify(str(clips / "00002.mp4"))[0].label
    assert page.read("#labels h2") == best
    assert not page.is_too_wide()
    page.keep_picture("labels")

    page.turn_to("Teacher")
    page.press("Look")
    page.wait(lambda: page.count("#look img") == 4 * 3)
    assert "32 of 64 (50%)" in page.read("#look p") and "cosine" in page.read("#look p")
    page.wait(lambda: page.see("#look img", ".every(image => image.naturalWidth == 64)"))
    drawn = page.list_sources("#look img")
    slider = page.see("input[type=range]")[0]
    slider.send_keys(Keys.HOME)
    page.wait(lambda: "64 of 64 (100%)" in page.read("#look p"))
    slider.send_keys(Keys.ARROW_RIGHT * 15)
    page.wait(lambda: "16 of 64 (25%)" in page.read("#look p"))
    sparser = page.list_sources("#look img")
    assert [old == new for old, new in zip(drawn, sparser, strict=True)] == [True, True, False] * 4
    assert len(set(page.see("#look img", ".map(image => image.getBoundingClientRect().left)"))) == 4
    assert not page.is_too_wide()
    page.keep_picture("teacher")
    page.press("New mask")
    page.wait(lambda: page.list_sources("#look img") not in ([], sparser))

    page.turn_to("Ask")
    page.write("a red circle?")
    page.press("Ask")
    answer = models.answerer.answer(str(clips / "00002.mp4"), "a red circle?").answer
    page.wait(lambda: page.read("#answer h2") == (answer or "(no answer)"))
    assert not page.is_too_wide()
    page.keep_picture("ask")


def test_search_and_examples_at_a_desk(page, models, clips):
    page.open(DESK)
    page.pick("#examples", 3)
    page.wait_for_clip("00003.mp4")
    page.turn_to("Search")
    assert "5 videos" in page.read("main") and "1 could not be read" in page.read("main")
    page.write(QUERY + Keys.ENTER)
    page.wait(lambda: page.count("#found img") == 5)
    hits = models.searcher.search(QUERY)
    captions = [f"{Path(hit.path).name} · {hit.similarity:.2f}" for hit in hits]
    assert page.see("#found .caption-label", ".map(e => e.innerText.trim())") == captions
    page.keep_picture("search")
    page.pick("#found", 1)
    page.wait_for_clip(Path(hits[1].path).name)
    page.turn_to("Labels")
    page.press("Classify")
    page.wait(lambda: page.read("#labels h2") == models.classifier.classify(hits[1].path)[0].label)
    page.pick("#examples", next(i for i in range(5) if f"0000{i}" not in hits[1].path))
    page.wait(lambda: not page.count("#labels h2"))  # nobody reads one clip's labels below another


def test_mistakes_are_told_in_plain_words(page, clips, sound):
    page.open(PHONE)
    for tab, button, words in (
        ("Labels", "Classify", "upload a clip first"),
        ("Teacher", "Look", "upload a clip first"),
        ("Ask", "Ask", "upload a clip first"),
        ("Search", "Search", "query is empty"),
    ):
        page.turn_to(tab)
        page.press(button)
        page.read_problem(words)
    page.pick("#examples", 0)
    page.wait_for_clip("00000.mp4")
    page.turn_to("Ask")
    page.press("Ask")
    page.read_problem("question is empty")
    page.turn_to("Labels")
    for path, reason in ((clips / "broken.mp4", "cannot be decoded"), (sound, "no video")):
        page.upload(path)
        page.press("Classify")
        page.wait(lambda path=path: path.name in page.read("[data-testid=toast-body]"))
        page.keep_picture(f"problem_{path.stem}")
        problem = page.read_problem(path.name)
        assert reason in problem and "Traceback" not in problem
        assert str(path.parent) not in problem and "/gradio" not in problem


def test_nothing_comes_from_elsewhere(page):
    """What follows every visit here sees the requests of a visit."""
    page.open(DESK)
    assert page.check_requests() > 20


def test_only_videos_are_served(page, settings, clips):
    import httpx

    served = httpx.get(f"{page.url}gradio_api/file={clips / '00000.mp4'}")
    assert served.status_code == 200 and served.content == (clips / "00000.mp4").read_bytes()
    hidden = Path(settings.classifier, "config.json")
    assert httpx.get(f"{page.url}gradio_api/file={hidden}").status_code == 403


def test_tabs_without_a_model_tell_how_to_fill_them():
    shown = json.dumps(app.build_demo(DemoSettings()).config["components"])
    for name in ("classifier", "teacher", "video-text", "videos", "question-answering"):
        assert f"`--{name}`" in shown
        assert f"`UMT_DEMO_{name.upper().replace('-', '_')}`" in shown
