"""Names of released checkpoints: found here, or converted once into the cache, from a Hub on this machine."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.hub.server import LoopbackHub
from tests.parity import reference
from tests.parity.test_student_parity import build_config
from tests.processes import run_ranks
from umt_hf.hub_cards import released_checkpoints
from umt_hf.hub_cards.released_names import resolve_released
from umt_hf.inference.loading import load_complete_model, load_video_processor
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.runs.model_names import find_released, name_cache_folder
from umt_hf.zoo import find_entry

NAME = "umt-vit-b16"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has a tiny file under the name of umt-vit-b16's; the current directory is empty."""
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        info, data = reference.load_case("student_k2_layerscale")
        torch.save({"model": data["weights"]}, tmp_path / "source.pth")
        config = build_config(info["constructor"])
        monkeypatch.setattr(released_checkpoints, "build_published_config", lambda name: (config, "pretraining"))
        hub.add_repo(find_entry(NAME).repo, {find_entry(NAME).file: tmp_path / "source.pth"})
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        yield hub


def test_other_names_come_back_as_they_are(hub, tmp_path):
    for name in ("owner/model", "bert-base-uncased", str(tmp_path), "./umt-vit-b16", "umt-vit-b17"):
        assert resolve_released(name, convert=True) == name
    assert resolve_released(tmp_path) == str(tmp_path)
    assert resolve_released(NAME) == NAME and not hub.requests


def test_a_name_is_converted_once_and_used_without_the_hub(hub, monkeypatch):
    said = []
    folder = resolve_released(NAME, convert=True, announce=said.append)
    assert folder == str(name_cache_folder(NAME)) and folder.startswith(constants.HF_HOME)
    assert said == [f"Converting {NAME}, once, into {folder}."]
    hub.down()
    requests = len(hub.requests)
    assert resolve_released(NAME, convert=True, announce=said.append) == folder
    assert resolve_released(NAME) == find_released(NAME) == folder
    # Objects of `inference` find it too.
    assert load_complete_model(UMTVideoForPreTraining, NAME).name_or_path == folder
    assert load_video_processor(NAME).num_frames
    assert len(said) == 1 and len(hub.requests) == requests
    assert not list(Path(folder).parent.glob("*.unfinished")) and not list(Path.cwd().iterdir())


def test_a_folder_in_the_current_directory_wins(hub):
    resolve_released(NAME, convert=True)
    Path(NAME).mkdir()
    assert resolve_released(NAME) == resolve_released(NAME, convert=True) == NAME


def test_half_a_folder_in_the_cache_does_not_count(hub):
    folder = name_cache_folder(NAME)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_released(NAME) == NAME
    resolve_released(NAME, convert=True)
    assert load_complete_model(UMTVideoForPreTraining, NAME)


def test_a_failed_conversion_leaves_nothing_and_is_tried_again(hub):
    hub.fail("b16_ptk710", status=404, times=2)
    with pytest.raises(OSError, match="umt-hf convert b16_ptk710_f8_res224.pth umt-vit-b16"):
        resolve_released(NAME, convert=True)
    assert resolve_released(NAME) == NAME and not name_cache_folder(NAME).exists()
    hub.heal()
    assert Path(resolve_released(NAME, convert=True)).is_dir()


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file/umt_hf cannot be written: .*Set HF_HOME to another folder"):
        resolve_released(NAME, convert=True)


def convert_in_a_process(home: str, source: str) -> None:
    """Convert, with a tiny file in the place of the download."""
    constants.HF_HOME = home
    info, _ = reference.load_case("student_k2_layerscale")
    config = build_config(info["constructor"])
    released_checkpoints.build_published_config = lambda name: (config, "pretraining")
    file = released_checkpoints.CheckpointFile(Path(source), "owner/model", "source.pth", "0" * 40)
    released_checkpoints.download_checkpoint = lambda entry, revision: file
    folder = resolve_released(NAME, convert=True, announce=print)
    assert load_complete_model(UMTVideoForPreTraining, folder)


def test_several_processes_convert_once(hub, tmp_path):
    output = run_ranks(convert_in_a_process, str(tmp_path / "home"), str(tmp_path / "source.pth"), num_processes=3)
    assert output.stdout.count("Converting") == 1
