"""A released name whose checkpoint is not on this machine: the page starts, and a button converts it from the Hub."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gradio")
pytest.importorskip("selenium.webdriver")

from tests.demo.browser import DESK, PHONE, Page, open_browser
from tests.hub.server import LoopbackHub
from tests.parity import reference
from umt_hf import UMTVideoConfig, cli
from umt_hf.demo import app
from umt_hf.demo.models import load_demo_models
from umt_hf.demo.settings import DemoSettings
from umt_hf.hub_cards import released_checkpoints
from umt_hf.inference.classification import VideoClassifier
from umt_hf.runs.model_names import name_cache_folder
from umt_hf.zoo import find_entry

NAME = "umt-vit-b16-k400"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a tiny file under the name of the released one; the current directory is empty."""
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        info, data = reference.load_case("classify_8f_224")
        arguments = info["constructor"]
        config = UMTVideoConfig(
            image_size=arguments["img_size"],
            num_frames=arguments["all_frames"],
            hidden_size=arguments["embed_dim"],
            num_hidden_layers=arguments["depth"],
            num_attention_heads=arguments["num_heads"],
            intermediate_size=int(arguments["embed_dim"] * arguments["mlp_ratio"]),
            num_labels=arguments["num_classes"],
        )
        monkeypatch.setattr(released_checkpoints, "build_published_config", lambda _: (config, "classification"))
        torch.save({"model": data["weights"]}, tmp_path / "source.pth")
        entry = find_entry(NAME)
        hub.add_repo(entry.repo, {entry.file: tmp_path / "source.pth"})
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        yield hub


@pytest.fixture
def page(hub, tmp_path):
    demo = app.launch_demo(DemoSettings(classifier=NAME), block=False)
    browser = open_browser()
    yield Page(next(browser), demo.local_url, tmp_path)
    demo.close()
    next(browser, None)


def test_a_button_converts_once_and_the_tab_fills_itself(page, hub):
    page.open(PHONE)
    page.wait(lambda: page.count("#look img"))
    page.turn_to("Labels")
    assert f"{NAME} is a released checkpoint that is not on this machine yet" in page.read("main")
    assert not page.count("#labels") and not hub.requests and not page.is_too_wide()
    page.keep_picture("pending")
    hub.fail("k400", status=500, times=100)
    page.press("Convert it now")
    problem = page.read_problem(find_entry(NAME).repo)
    assert "Traceback" not in problem and not name_cache_folder(NAME).exists()
    hub.heal()
    page.press("Convert it now")
    page.wait(lambda: page.count("#labels h2"))
    folder = name_cache_folder(NAME)
    classifier = VideoClassifier(folder)
    best = classifier.classify(str(app.CLIP))[0]
    assert page.read("#labels h2") == best.label
    assert not page.see("button.lg", ".filter(e => e.innerText.includes('Convert')).length")
    page.keep_picture("converted")
    # The next visitor finds the tab filled, and so does the next start, without the Hub.
    hub.down()
    requests = len(hub.requests)
    page.open(DESK)
    page.turn_to("Labels")
    page.wait(lambda: page.read("#labels h2") == best.label)
    again = load_demo_models(DemoSettings(classifier=NAME))
    assert not again.pending and again.classifier.classify(str(app.CLIP))[0] == best
    assert len(hub.requests) == requests and not list(Path.cwd().iterdir())


def test_names_for_another_setting_are_refused_in_a_line(hub, monkeypatch):
    launched = []
    monkeypatch.setattr(app, "launch_demo", lambda *arguments: launched.append(arguments))
    for flag, name, words in (
        ("--classifier", "umt-vit-b16", "umt-vit-b16 is a released checkpoint for pretraining"),
        ("--teacher", NAME, "needs an image tower, such as a CLIP"),
        ("--question-answering", NAME, "needs a checkpoint for question_answering"),
    ):
        with pytest.raises(ValueError, match=words):
            load_demo_models(DemoSettings(**{flag[2:].replace("-", "_"): name}))
    assert CliRunner().invoke(cli.app, ["demo", "--classifier", NAME]).exit_code == 0
    assert launched and not hub.requests


def test_a_student_is_pending_beside_its_teacher(hub, settings):
    models = load_demo_models(DemoSettings(teacher=settings.teacher, student="umt-vit-b16"))
    assert models.pending == {"student": "umt-vit-b16"} and models.viewer.student is None
    assert "Convert it now" in str(app._lay_out(models, models.settings).config["components"])
