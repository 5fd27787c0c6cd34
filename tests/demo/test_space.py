"""The demo as a Space, on the loopback Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

import umt_hf
from umt_hf.demo.first_look import CLIP, SALIENCY
from umt_hf.demo.settings import DemoSettings
from umt_hf.demo.space import push_space

pytest.importorskip("gradio")
TEACHER = "openai/clip-vit-base-patch16"


@pytest.mark.heavy
@pytest.mark.slow
def test_a_pushed_space_runs_on_its_own_files(hub, clips, tmp_path):
    settings = DemoSettings(teacher=TEACHER, videos=str(clips))
    url = push_space("umt-demo", settings, private=True)
    assert url == f"{hub.url}/spaces/me/umt-demo"
    repo = hub.repo("me/umt-demo", "space")
    assert repo.private and repo.sdk == "gradio"
    push_space("me/umt-demo", settings)

    space = Path(snapshot_download("me/umt-demo", repo_type="space", local_dir=tmp_path / "space"))
    assert json.loads((space / "demo.json").read_text()) == {"teacher": TEACHER, "videos": "videos"}
    assert (space / "videos" / "00000.mp4").read_bytes() == (clips / "00000.mp4").read_bytes()
    header = (space / "README.md").read_text().split("---")[1]
    assert "app_file: app.py" in header and (space / "requirements.txt").is_file()
    assert not list(space.rglob("*.pyc"))
    for file in (CLIP, SALIENCY):
        assert (space / "umt_hf" / "demo" / file.name).read_bytes() == file.read_bytes()
    # The models are not here: only that the page's code is the Space's own.
    code = "import app, umt_hf; app.build_demo(app.DemoSettings(videos='videos')); print(umt_hf.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = Path(run.stdout.splitlines()[-1])
    assert found.is_relative_to(space) and found != Path(umt_hf.__file__)


def test_what_a_space_could_not_load_is_refused(settings):
    with pytest.raises(ValueError, match="push it to the Hub first"):
        push_space("me/umt-demo", settings)
    with pytest.raises(ValueError, match="index"):
        push_space("me/umt-demo", DemoSettings(video_text="me/model", index="index"))
