"""The clip and the saliency that come with the package: small, made by our generator, and right about the shape."""

import numpy as np
import pytest

from tests.demo.first_look import SCALE, render_first_clip, write_first_look
from umt_hf.demo.first_look import CLIP, SALIENCY, StoredViewer
from umt_hf.demo.models import load_demo_models
from umt_hf.demo.settings import DemoSettings
from umt_hf.processing.decoding import open_video


def test_the_files_are_small_and_what_the_generator_makes(settings, tmp_path):
    assert CLIP.stat().st_size < 50_000 and SALIENCY.stat().st_size < 5_000
    write_first_look(settings.teacher, tmp_path / "clip.mp4", tmp_path / "saliency.npy")
    with open_video(str(CLIP)) as shipped, open_video(str(tmp_path / "clip.mp4")) as made:
        assert shipped.num_frames == made.num_frames == 24
        frames, again = (reader.get_frames(list(range(24))).astype(int) for reader in (shipped, made))
    # Other builds of x264 may round otherwise.
    assert abs(frames - again).mean() < 1
    assert abs(frames - render_first_clip()[0]).mean() < 5
    stored, of_another = np.load(SALIENCY), np.load(tmp_path / "saliency.npy")
    assert stored.dtype == of_another.dtype == np.float16 and stored.shape == (8, 64)


def test_the_stored_saliency_is_where_the_shape_is():
    saliency = np.load(SALIENCY).reshape(8, 8, 8).astype(float)
    boxes = render_first_clip()[1]
    patch = 8 * SCALE
    for t, heat in enumerate(saliency):
        # The frame in the middle of each eighth of the clip.
        left, top, right, bottom = np.array([*boxes[3 * t + 1]]) // patch
        inside = heat[top : bottom + 1, left : right + 1]
        assert inside.sum() / heat.sum() > 0.5, t
        assert inside.size <= 16


def test_without_a_teacher_masks_are_drawn_from_the_stored_saliency(clips):
    viewer = load_demo_models(DemoSettings()).viewer
    assert isinstance(viewer, StoredViewer) and viewer.student is None
    look = viewer.look(str(CLIP), "attention", 0.8)
    assert (look.num_visible, look.num_patches, look.agreement) == (104, 512, None)
    hidden = (look.frames.visible != look.frames.clip).any(-1)
    assert hidden.mean() == pytest.approx(1 - 104 / 512, abs=0.01)
    denser = viewer.look(str(CLIP), "attention", 0.5)
    assert not ((denser.frames.visible != denser.frames.clip).any(-1) & ~hidden).any()
    with pytest.raises(ValueError, match="only the clip of the package"):
        viewer.look(str(clips / "00000.mp4"), "attention", 0.8)
