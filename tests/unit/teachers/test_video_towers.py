"""Towers that see clips, as further teachers: features of the model by itself, tubelets, sizes, what is refused."""

import json
import shutil
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umt_hf import UMTTeacher
from umt_hf.modeling.modeling_umt_video import interpolate_position_table
from umt_hf.training.alignment import compute_targets, load_teacher
from umt_hf.training.arguments import TeacherArguments

from .towers import SIZES, VIDEO_KINDS, WIDE, build_tower

KINDS = list(VIDEO_KINDS)
# A weight of each that a folder may lack.
LACKING = {"videomae": "layernorm.weight", "vjepa2": "encoder.layernorm.weight"}


def run_alone(kind: str, tower: Any, video: torch.Tensor) -> list[torch.Tensor]:
    """Output of each layer through what the model puts behind its last one, as Transformers itself runs it."""
    options = {} if kind == "videomae" else {"skip_predictor": True}
    with torch.no_grad():
        states = tower(video, output_hidden_states=True, **options).hidden_states[-SIZES["num_hidden_layers"] :]
        return [(tower.layernorm if kind == "videomae" else tower.encoder.layernorm)(layer) for layer in states]


def spread(tokens: torch.Tensor, tubelets: int) -> torch.Tensor:
    """Tokens of tubelets `(B, tubelets * P, D)` given to both frames of each, of unit length."""
    frames = tokens.unflatten(1, (tubelets, -1)).repeat_interleave(2, dim=1)
    return F.normalize(frames.flatten(1, 2), dim=-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model_and_frames_share_a_tubelet(kind, attention):
    video = torch.randn(2, 4, 3, 32, 32)
    own = run_alone(kind, build_tower(kind, attention), video)
    teacher = UMTTeacher(build_tower(kind, attention), num_aligned_layers=2, alignment_interval=2)
    features = teacher.compute_features(video)
    assert features.shape == (2, 2, 4 * 16, 24) and features.dtype == torch.float32
    for found, expected in zip(features, (own[1], own[3]), strict=True):
        torch.testing.assert_close(found, spread(expected, 2), atol=2e-5, rtol=1e-4)
    frames = features.unflatten(2, (4, 16))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1]) and not torch.equal(frames[:, :, 1], frames[:, :, 2])


@pytest.mark.parametrize("mask_type", ["attention", "random"])
@pytest.mark.parametrize("kind", [*KINDS, "siglip", "clip", "dinov3_vit"])
def test_beside_another_teacher_it_gives_its_features_at_the_visible_tokens(kind, mask_type):
    first, other = UMTTeacher(build_tower("clip"), 2), UMTTeacher(build_tower(kind), 2)
    video, noise = torch.randn(2, 4, 3, 32, 32), torch.empty(2, 64).exponential_()
    visible, alone = compute_targets(first, video, noise, mask_type, 0.75)
    again, features, further = compute_targets(first, video, noise, mask_type, 0.75, [other])
    assert torch.equal(again, visible) and torch.equal(features, alone)
    index = visible[None, ..., None].expand(2, -1, -1, other.hidden_size)
    torch.testing.assert_close(further, other.compute_features(video).gather(2, index), atol=2e-6, rtol=1e-5)


def test_places_of_a_videomae_are_carried_over_to_other_clips():
    """More frames and larger ones; Transformers' own model takes those it was trained with alone."""
    tower, video = build_tower("videomae"), torch.randn(1, 8, 3, 48, 48)
    found = UMTTeacher(build_tower("videomae"), 1, image_size=48).compute_features(video)
    table = interpolate_position_table(tower.embeddings.position_embeddings, (2, 4, 4), (4, 6, 6))
    sizes = {**VIDEO_KINDS["videomae"][2], "num_frames": 8, "image_size": 48}
    larger = VideoMAEModel(VideoMAEConfig(**{**SIZES, **sizes})).eval()
    larger.load_state_dict(tower.state_dict())
    larger.embeddings.position_embeddings = table
    expected = spread(run_alone("videomae", larger, video)[-1], 4)
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)


def test_places_of_a_vjepa2_are_counted_in_larger_frames():
    video = torch.randn(1, 6, 3, 48, 48)
    found = UMTTeacher(build_tower("vjepa2"), 1, image_size=48).compute_features(video)
    own = run_alone("vjepa2", build_tower("vjepa2", crop_size=48), video)[-1]
    torch.testing.assert_close(found[0], spread(own, 3), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_strictly_and_in_its_own_pixels(kind, tmp_path):
    video = torch.randn(1, 4, 3, 32, 32)
    tower = build_tower(kind)
    tower.save_pretrained(tmp_path / "whole")
    loaded = UMTTeacher.from_pretrained(str(tmp_path / "whole"), 2)
    torch.testing.assert_close(
        loaded.compute_features(video), UMTTeacher(build_tower(kind), 2).compute_features(video)
    )
    assert not any("predictor" in name for name in loaded.state_dict())
    # V-JEPA 2 comes with a processor of videos, VideoMAE with one of images.
    name = "video_preprocessor_config.json" if kind == "vjepa2" else "preprocessor_config.json"
    (tmp_path / "whole" / name).write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    own = [torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    pixels = (video * own[1] + own[0] - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(3, 1, 1)
    expected = spread(run_alone(kind, build_tower(kind), pixels)[-1], 2)
    found = UMTTeacher.from_pretrained(str(tmp_path / "whole"), 1).compute_features(video)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)

    weights = load_file(tmp_path / "whole" / "model.safetensors")
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    kept = {key: value for key, value in weights.items() if key != LACKING[kind]}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"half is not a complete .* encoder.*: it lacks {LACKING[kind]}"):
        UMTTeacher.from_pretrained(str(half), 2)


def test_a_videomae_with_its_decoder_gives_its_encoder(tmp_path, caplog):
    decoder = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 12, "decoder_num_attention_heads": 2}
    torch.manual_seed(0)
    model = VideoMAEForPreTraining(VideoMAEConfig(**SIZES, **WIDE, **decoder, num_frames=4)).eval()
    model.save_pretrained(tmp_path)
    teacher, video = UMTTeacher.from_pretrained(str(tmp_path), 1), torch.randn(1, 4, 3, 32, 32)
    assert "LOAD REPORT" not in caplog.text
    with torch.no_grad():  # pooled by the mean, it has no last norm
        expected = spread(model.videomae(video).last_hidden_state, 2)
    torch.testing.assert_close(teacher.compute_features(video)[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_no_masks_and_leaves_no_frame_out(kind, tmp_path):
    build_tower(kind).save_pretrained(tmp_path)
    teacher = UMTTeacher.from_pretrained(str(tmp_path), 1)
    with pytest.raises(ValueError, match="has no saliency, from which masks are drawn: name an image teacher first"):
        teacher(torch.randn(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="clip of 5 frames cannot be cut into the tubelets of 2 frames of a V"):
        teacher.compute_features(torch.randn(1, 5, 3, 32, 32))
    args = TeacherArguments(teacher_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"which the teacher must be: .*'{kind}'.* name it second in --teacher_name"):
        load_teacher(args, "sdpa", Accelerator(cpu=True))
