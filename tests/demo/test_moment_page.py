"""The page over an index of moments, in a browser for itself: a result is played from where its moment begins."""

from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.keys import Keys

from tests.demo.browser import DESK, Page, open_browser
from umt_hf.demo import app
from umt_hf.demo.models import FolderSearcher
from umt_hf.demo.settings import DemoSettings
from umt_hf.inference.search import embed_videos

QUERY = "a red circle moving left"


@pytest.fixture
def driver():
    yield from open_browser()


def test_a_moment_is_played_from_its_second(driver, settings, clips, tmp_path):
    index = str(tmp_path / "index")
    embed_videos([settings.videos], settings.video_text, index, window=1, stride=0.5)
    only = DemoSettings(video_text=settings.video_text, videos=settings.videos, index=index)
    demo = app.launch_demo(only, block=False)
    try:
        page = Page(driver, demo.local_url, tmp_path)
        page.open(DESK)
        page.turn_to("Search")
        page.write(QUERY + Keys.ENTER)
        page.wait(lambda: page.count("#found img") == 5)
        hits = FolderSearcher(settings.videos, settings.video_text, index).search(QUERY)
        place = next(i for i, hit in enumerate(hits) if hit.start_seconds >= 1)
        second = hits[place].start_seconds
        assert f"0:0{int(second)} ·" in page.see("#found .caption-label", ".map(e => e.innerText.trim())")[place]
        page.pick("#found", place)
        page.wait_for_clip(Path(hits[place].path).name)
        # It plays on in a circle: the times that are seen begin with the second of the moment, not with 0.
        times = []
        page.wait(lambda: times.extend(page.see("#clip video", ".map(e => e.currentTime)")) or max(times) >= second)
        assert min(time for time in times if time > 0.3) >= second - 0.1, times
        assert page.check_requests() > 20
    finally:
        demo.close()
