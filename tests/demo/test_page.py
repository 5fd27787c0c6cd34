"""The page in a real browser, at the width of a phone and of a desk: what a visitor does, reads and cannot break."""

import json
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")
pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.keys import Keys  # noqa: E402 (skipped where it is missing)

from tests.demo.browser import DESK, PHONE, Page, open_browser  # noqa: E402
from tests.demo.conftest import LABELS  # noqa: E402
from umt_hf.demo import app  # noqa: E402
from umt_hf.demo.settings import DemoSettings  # noqa: E402

QUERY = "a red circle moving left"


@pytest.fixture(scope="module")
def driver():
    yield from open_browser()


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
    page.turn_to("Labels")
    page.upload(clips / "00002.mp4")
    page.wait(lambda: all(label in page.read("#labels") for label in LABELS))
    best = models.classifier.classify(str(clips / "00002.mp4"))[0].label
    assert page.read("#labels h2") == best
    assert not page.is_too_wide()
    page.keep_picture("labels")

    page.turn_to("Teacher")
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
    page.wait(lambda: page.read("#labels h2") == models.classifier.classify(hits[1].path)[0].label)
    other = next(i for i in range(5) if f"0000{i}" not in hits[1].path)
    page.pick("#examples", other)
    page.wait_for_clip(f"0000{other}.mp4")
    found = models.classifier.classify(str(clips / f"0000{other}.mp4"))
    page.wait(lambda: page.read("#labels h2") == found[0].label)


def test_mistakes_are_told_in_plain_words(page, clips, sound):
    page.open(PHONE)
    page.clear_clip()
    for tab, button, words in (
        ("Labels", "Classify", "upload a clip first"),
        ("Teacher", "New mask", "upload a clip first"),
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
        page.wait(lambda path=path: path.name in page.read("[data-testid=toast-body]"))
        assert page.count("[data-testid=toast-body]") == 1  # once, not by each tab
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
    shown = json.dumps(app.build_demo(DemoSettings()).config["components"], default=str)
    for name in ("classifier", "teacher", "video-text", "videos", "question-answering"):
        assert f"`--{name}`" in shown
        assert f"`UMT_DEMO_{name.upper().replace('-', '_')}`" in shown
