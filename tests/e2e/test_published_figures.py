"""Released classifiers beside their published figures, from a Hub on this machine."""

import json
import shutil
from itertools import product

import pytest
import torch

from tests.hub.fork_server import build_narrow_config
from tests.hub.released import NARROW_WIDTHS, build_released_tensors, list_released_shapes
from tests.hub.server import LoopbackHub
from umt_hf.evaluation.classification import main
from umt_hf.evaluation.published import compare_with_published, compute_wilson_interval
from umt_hf.hub_cards import released_checkpoints
from umt_hf.zoo import find_entry

NAME = "umt-vit-b16-k400"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has the checkpoint, so narrow that it takes milliseconds; the current directory is empty."""
    entry = find_entry(NAME)
    released = list_released_shapes(entry)
    shapes = {name: [NARROW_WIDTHS.get(size, size) for size in shape] for name, shape in released.items()}
    torch.save({"model": build_released_tensors(entry, shapes)}, tmp_path / "source.pth")
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        hub.add_repo(entry.repo, {entry.file: tmp_path / "source.pth"})
        monkeypatch.setattr(released_checkpoints, "build_published_config", build_narrow_config)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub


@pytest.fixture
def videos(shapes, tmp_path):
    """Eight clips in folders named as Kinetics names its classes: four each of two."""
    clips = sorted((shapes / "videos" / "train").glob("*.mp4"))[:8]
    for clip, label in zip(clips, ["archery"] * 4 + ["riding a bike"] * 4, strict=True):
        (tmp_path / "k400" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "k400" / label)
    return tmp_path / "k400"


def test_a_released_classifier_is_converted_and_compared(hub, videos, tmp_path, caplog):
    caplog.set_level("INFO", "umt_hf")
    words = ["--published", NAME, "--data", str(videos), "--max_eval_samples", "4", "--dataloader_num_workers", "0"]
    metrics = main([*words, "--num_clips", "1", "--num_crops", "3", "--output_dir", str(tmp_path / "report")])
    said = json.loads((tmp_path / "report" / "report.json").read_text())
    low, high = (100 * bound for bound in compute_wilson_interval(metrics["top1_accuracy"], 4))
    assert said["num_videos"] == 4 and said["model"] == NAME
    assert said["published"]["figure"]["value"] == 87.4 and said["published"]["interval"] == [low, high]
    assert said["published"]["views"] == "8x3x1" and said["published"]["figure"]["views"] == "8x3x4"
    shown = {entry["label"] for entry in json.loads((tmp_path / "report" / "predictions.json").read_text())}
    assert shown == {"archery", "riding a bike"}  # the first four are of one class
    line = f"{NAME} on 4 videos, 8x3x1 views: top-1 accuracy {100 * metrics['top1_accuracy']:.1f} % (95 % confidence: "
    assert f"{line}{low:.1f} to {high:.1f}); published for Kinetics-400, 8x3x4 views: 87.4 %, " in caplog.text
    assert hub.count_requests("GET .*b16_ptk710_ftk710_ftk400_f8_res224.pth") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((NAME, "--model_name_or_path", "mine"), "published names the model that is tested: leave model_name_or_path"),
        (("umt-vit-b16",), "umt-vit-b16 has no published accuracy; those with one are umt-vit-b16-k710, "),
        (("umt-vit-b17-k400",), "umt-vit-b16-k400"),
        ((NAME, "--max_eval_samples", "0"), "max_eval_samples"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(hub, words, message):
    with pytest.raises(ValueError, match=message):
        main(["--published", *words, "--data", "k400"])
    assert not hub.requests


def test_the_interval_covers_the_share_of_all_videos_as_often_as_it_says():
    """Counted over every result that a sample can have, weighted by how likely it is."""
    for number, share in product((20, 100), (0.1, 0.5, 0.874)):
        likely = torch.distributions.Binomial(number, torch.tensor(share, dtype=torch.float64))
        covered = 0.0
        for right in range(number + 1):
            low, high = compute_wilson_interval(right / number, number)
            covered += likely.log_prob(torch.tensor(float(right))).exp().item() * (low <= share <= high)
        assert 0.93 < covered < 0.98, (number, share, covered)
    assert compute_wilson_interval(0, 10)[0] == 0 and compute_wilson_interval(1, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(("accuracy", "place"), [(0.87, "within"), (0.95, "below"), (0.5, "above")])
def test_where_the_published_figure_lies_is_said(accuracy, place):
    compared = compare_with_published(NAME, accuracy, 500, 8, 3, 4)
    assert compared.agrees == (place == "within")
    assert compared.format().endswith(f"published for Kinetics-400, 8x3x4 views: 87.4 %, {place} the interval.")


@pytest.mark.parametrize("record", [None, {"name": "umt-vit-b16-k400"}])
def test_another_model_under_the_name_of_a_released_one_is_refused(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "umt-vit-b16-ssv2").mkdir()
    if record is not None:
        (tmp_path / "umt-vit-b16-ssv2" / "conversion.json").write_text(json.dumps(record))
    found = "says umt-vit-b16-k400" if record else "is not there"
    with pytest.raises(
        ValueError, match=rf"the folder umt-vit-b16-ssv2 is not umt-vit-b16-ssv2 as released \(.*{found}"
    ):
        main(["--published", "umt-vit-b16-ssv2", "--data", "k400"])
