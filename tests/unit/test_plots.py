"""Pictures: what is drawn where; how they look is for people to judge."""

import json
import os
import pkgutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import umt_hf
from umt_hf.plots import (
    HIDDEN_GREY,
    STAGE_2_CURVES,
    AccuracyPanel,
    FoundVideo,
    PicturedFrame,
    TimelineSpan,
    denormalize,
    draw_masked_frames,
    plot_accuracy,
    plot_confusion_matrix,
    plot_curves,
    plot_detections,
    plot_found_videos,
    plot_losses,
    plot_masks,
    plot_timeline,
)


def test_found_videos_are_framed_by_right_and_wrong(tmp_path):
    clip = torch.zeros(4, 3, 16, 16)
    found = [FoundVideo("a cat", "a cat", True, clip), FoundVideo("a dog", "a cat", False, clip[:3])]
    plot_found_videos(found, tmp_path / "found.png")
    pixels = np.asarray(Image.open(tmp_path / "found.png").convert("RGB")).astype(int)
    upper, lower = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    for half, color, other in ((upper, (44, 160, 44), (214, 39, 40)), (lower, (214, 39, 40), (44, 160, 44))):
        assert (abs(half - color).sum(-1) < 30).sum() > 200 > (abs(half - other).sum(-1) < 30).sum()


ODD_NAMES = ("cost_$5_and_$6_", r"$\foo$", "_hidden $^{ \udcff")


def test_a_timeline_has_gaps_where_a_class_has_no_value(tmp_path, monkeypatch):
    """It is not among those that were kept of a window, which does not make it unlikely."""
    drawn: list[np.ndarray] = []
    save = Figure.savefig

    def record(figure, *args, **options):
        drawn.extend(patch.get_data().values for patch in figure.axes[0].patches)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    spans = [TimelineSpan(0, 1, {"a": 0.6}), TimelineSpan(1, 2, {"b": 0.5}), TimelineSpan(2, 3, {"a": 0.7, "b": 0.2})]
    plot_timeline(spans, tmp_path / "a.png")
    np.testing.assert_equal([values.tolist() for values in drawn], [[0.6, np.nan, 0.7], [np.nan, 0.5, 0.2]])


def test_a_timeline_of_one_frame_is_drawn_without_a_remark(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_timeline([TimelineSpan(0.0, 0.0, {"a": 0.6})], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_names_are_written_as_they_are(tmp_path, monkeypatch):
    """A `$` in a name of a file or class, or in a caption, begins no formula; an underscore hides nothing."""
    drawn: list[str] = []
    save = Figure.savefig

    def record(figure, *args, **options):
        drawn.extend(text.get_text() for text in figure.findobj(Text))
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    clip, frame = torch.zeros(2, 3, 16, 16), np.zeros((16, 16, 3), np.uint8)
    box = np.array([[0.1, 0.1, 0.8, 0.8]])
    for number, name in enumerate(ODD_NAMES):
        spans = [TimelineSpan(0.0, 1.0, {name: 0.7, "other": 0.3})]
        pictured = PicturedFrame(frame, name, box, [[(name, 0.5)]], box, [[name]])
        for kind, draw in {
            "timeline": lambda path, spans=spans, name=name: plot_timeline(spans, path, name),
            "found": lambda path, name=name: plot_found_videos([FoundVideo(name, name, False, clip)], path),
            "detections": lambda path, pictured=pictured: plot_detections([pictured], path),
            "confusion": lambda path, name=name: plot_confusion_matrix(np.eye(2), [name, "other"], path),
            "masks": lambda path, name=name: plot_masks(
                clip, torch.rand(2, 4), torch.zeros(8, dtype=torch.bool), path, name
            ),
            "curves": lambda path, name=name: plot_curves([{"step": 1, "loss": 1.0}], path, {"loss": "a"}, name),
        }.items():
            drawn.clear()
            draw(tmp_path / f"{kind}{number}.png")
            assert np.asarray(Image.open(tmp_path / f"{kind}{number}.png")).std() > 0
            shown = name.encode(errors="replace").decode()
            assert sum(shown in text for text in drawn) >= (
                2 if kind in ("timeline", "detections", "confusion") else 1
            )
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png"] * (6 * len(ODD_NAMES))


def test_losses_are_drawn_by_name(tmp_path):
    lines = [{"step": step, "video_vtc_loss": 3.0 / step, "other": 1.0} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png", STAGE_2_CURVES, "loss")
    pixels = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB")).astype(int)
    assert (abs(pixels - (31, 119, 180)).sum(-1) < 40).sum() > 100  # one curve, in the first colour


def test_denormalized_frames_are_in_range():
    frames = denormalize(torch.randn(2, 3, 8, 8) * 5)
    assert frames.shape == (2, 8, 8, 3) and frames.min() >= 0 and frames.max() <= 1


def test_accuracy_shows_mean_and_spread_of_the_seeds(tmp_path):
    """Seeds that disagree leave a shaded band, which seeds that agree do not; a label keeps its colour."""
    agreeing = [[(10, 0.2), (20, 0.5)]] * 2
    disagreeing = [[(10, 0.1), (20, 0.4)], [(10, 0.3), (20, 0.6)]]
    pictures = []
    for name, curves in (("agree", agreeing), ("disagree", disagreeing)):
        panels = [AccuracyPanel("motion", {"scratch": curves}, 0.25), AccuracyPanel("appearance", {}, 0.03)]
        plot_accuracy([*panels, AccuracyPanel("low", {"UMT": agreeing}, 0.25)], tmp_path / f"{name}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int))
    assert pictures[0].shape == pictures[1].shape
    bluish = [((p[..., 2] - p[..., 0] > 20) & (p.sum(-1) > 600)).sum() for p in pictures]
    assert bluish[1] > bluish[0] + 2000


def test_saliency_and_mask_lie_over_their_patches(tmp_path):
    clip = torch.randn(2, 3, 8, 8)
    saliency = torch.tensor([[9.0, 1, 1, 1], [1, 1, 1, 9]])
    mask = torch.tensor([False, True, True, True, True, True, True, False])
    drawn = draw_masked_frames(clip, saliency, mask)
    np.testing.assert_array_equal(drawn.visible[0, :4, :4], drawn.clip[0, :4, :4])
    np.testing.assert_array_equal(drawn.visible[1, 4:, 4:], drawn.clip[1, 4:, 4:])
    assert (drawn.visible[0, 4:] == drawn.visible[0, 4, 0]).all() and (drawn.visible[1, :4] == HIDDEN_GREY).all()
    brightness = drawn.saliency.mean(-1)
    assert brightness[0, :4, :4].min() > brightness[0, 4:].max()
    assert brightness[1, 4:, 4:].min() > brightness[1, :4].max()
    plot_masks(clip, saliency, mask, tmp_path / "masks.png", "a clip")
    assert np.asarray(Image.open(tmp_path / "masks.png")).shape[1] > 300


@pytest.mark.heavy
def test_the_users_back_end_stays(tmp_path):
    """After importing each module; what draws in a notebook or a window goes on to do so."""
    names = [module.name for module in pkgutil.walk_packages(umt_hf.__path__, "umt_hf.")]
    assert len(names) > 60
    code = "\n".join(
        [
            "import importlib, matplotlib",
            "matplotlib.use('svg')",
            f"for name in {names!r}:",
            "    importlib.import_module(name)",
            "    assert matplotlib.get_backend() == 'svg', name",
            "from umt_hf.plots import plot_curves",
            "plot_curves([{'step': 1, 'loss': 1.0}], 'losses.png', {'loss': 'loss'}, 'loss')",
            "assert matplotlib.get_backend() == 'svg'",
            "import sys; assert 'matplotlib.pyplot' not in sys.modules or 'gradio' in sys.modules",
        ]
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
