import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from umt_hf.modeling.configuration_umt_video_text import UMTVideoTextConfig
from umt_hf.processing.train_transforms import ClipCrop, PretrainingTransform, ResizedCropTransform, list_crop_places
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor

TABLES = json.loads((Path(__file__).parents[2] / "fixtures" / "single_modality" / "multiscale_crop.json").read_text())[
    "tables"
]


def make_clip(height: int, width: int, seed: int = 0, frames: int = 2) -> torch.Tensor:
    """Smooth noise, so that resizing has something to keep."""
    coarse = torch.rand(frames, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "x".join(map(str, table["image_w_h"])))
def test_candidate_crops_equal_the_published_ones(table):
    width, height = table["image_w_h"]
    sizes = PretrainingTransform(table["input_size"]).list_crop_sizes(height, width)
    assert [[wide, tall] for tall, wide in sizes] == table["pairs_w_h"]
    for (tall, wide), places in zip(sizes, table["offsets_w_h_for_each_pair"], strict=True):
        assert [[left, top] for top, left in list_crop_places(height, width, tall, wide)] == places


def test_draws_cover_the_candidates_evenly():
    transform = PretrainingTransform(224)
    generator = torch.Generator().manual_seed(0)
    draws = [transform.sample(240, 320, generator) for _ in range(4000)]
    assert abs(sum(draw.flip for draw in draws) / 4000 - 0.5) < 0.03
    sizes = transform.list_crop_sizes(240, 320)
    for size in sizes:
        chosen = [draw for draw in draws if (draw.height, draw.width) == size]
        assert abs(len(chosen) / 4000 - 1 / len(sizes)) < 0.02
        assert {(draw.top, draw.left) for draw in chosen} == set(list_crop_places(240, 320, *size))


def test_a_generator_fixes_the_draw():
    transform = PretrainingTransform(224)
    draws = [transform.sample(240, 320, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4, 5)]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_without_a_generator_the_view_is_the_middle_square():
    transform = PretrainingTransform(32, flip_probability=1.0)
    assert transform.sample(240, 321) == ClipCrop(0, 40, 240, 240, flip=False)
    assert transform.sample(320, 240) == ClipCrop(40, 0, 240, 240, flip=False)


def test_flip_probability_and_scales_are_obeyed():
    generator = torch.Generator().manual_seed(0)
    fixed = PretrainingTransform(64, scales=(1.0,), flip_probability=0.0)
    assert {fixed.sample(100, 100, generator) for _ in range(20)} == {ClipCrop(0, 0, 100, 100, flip=False)}


def test_crop_inside_is_a_view_and_outside_is_black():
    clip = make_clip(100, 222) | 1  # no pixel is black
    inside = PretrainingTransform.crop(clip, ClipCrop(10, 20, 50, 60, flip=False))
    assert torch.equal(inside, clip[..., 10:60, 20:80])
    assert inside.untyped_storage().data_ptr() == clip.untyped_storage().data_ptr()
    outside = PretrainingTransform.crop(clip, ClipCrop(0, -4, 100, 224, flip=False))
    assert outside.shape == (2, 3, 100, 224) and outside.dtype == torch.uint8
    assert (outside[..., :4] == 0).all() and torch.equal(outside[..., 4:], clip[..., :220])
    larger = PretrainingTransform.crop(clip, ClipCrop(-2, -1, 104, 224, flip=False))
    assert torch.equal(larger[..., 2:102, 1:223], clip)
    assert (larger[..., :2, :] == 0).all() and (larger[..., 102:, :] == 0).all() and (larger[..., 223:] == 0).all()


def test_pixels_equal_the_published_steps():
    """Crop, PIL's bilinear resize, flip, ImageNet normalisation; PIL and torchvision round one level apart at most."""
    transform = PretrainingTransform(48)
    clip = make_clip(120, 160)
    crop = ClipCrop(5, 7, 105, 90, flip=True)
    result = transform.resize_and_normalize([transform.crop(clip, crop)], [crop.flip])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for frame, ours in zip(clip, result[0], strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy()).crop((7, 5, 97, 110))
        image = image.resize((48, 48), Image.Resampling.BILINEAR).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = torch.from_numpy(np.array(image)) / 255
        assert ((ours.permute(1, 2, 0) * std + mean - expected).abs() < 1.01 / 255).all()


def test_a_clip_does_not_depend_on_its_batch():
    transform = PretrainingTransform(32)
    clips = [make_clip(60, 80, seed=0), make_clip(90, 41, seed=1), make_clip(60, 80, seed=2)]
    flips = [True, False, False]
    batch = transform.resize_and_normalize(clips, flips)
    assert batch.shape == (3, 2, 3, 32, 32) and batch.dtype == torch.float32
    for clip, flip, result in zip(clips, flips, batch, strict=True):
        assert torch.equal(transform.resize_and_normalize([clip], [flip])[0], result)
    permuted = clips[1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as a decoder lays it out
    assert torch.equal(transform.resize_and_normalize([permuted], [False])[0], batch[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the processor with the GPU")
def test_gpu_gives_the_same_pixels():
    transform = PretrainingTransform(32)
    clip = make_clip(60, 80)
    on_gpu = transform.resize_and_normalize([clip.cuda()], [True]).cpu()
    assert (transform.resize_and_normalize([clip], [True]) - on_gpu).abs().max() < 1.01 / 255 / 0.224


TRANSFORMS = Path(__file__).parents[2] / "fixtures" / "multi_modality" / "transforms"


def assert_same_pixels(ours: torch.Tensor, published: torch.Tensor) -> None:
    """Equal, but that a value halfway between two grey levels may be rounded the other way by another kernel."""
    difference = (ours - published).abs()
    assert (difference > 1e-5).float().mean() < 1e-3 and difference.max() < 1.01 / 255 / 0.224


def test_video_text_crops_equal_the_published_ones():
    table = json.loads(TRANSFORMS.with_suffix(".json").read_text())
    tensors = load_file(TRANSFORMS.with_suffix(".safetensors"))
    transform = ResizedCropTransform(table["image_res"], table["scale"], table["ratio"])
    clip = tensors["inputs/clip_u8"]
    for draw in table["draws"]:
        crop = ClipCrop(*draw["crop_top_left_height_width"], flip=draw["flipped"])
        ours = transform.resize_and_normalize([transform.crop(clip, crop)], [crop.flip])[0]
        published = tensors[f"outputs/train_antialias0/draw{draw['draw']}"]
        assert_same_pixels(ours, published)
    for name in ("clip", "image", "same"):
        frames = tensors[f"inputs/{name}_u8"]
        crop = transform.sample(*frames.shape[-2:])
        ours = transform.resize_and_normalize([transform.crop(frames, crop)], [crop.flip])[0]
        assert_same_pixels(ours, tensors[f"outputs/test_antialias0/{name}"])
        config = UMTVideoTextConfig(
            vision_config={"image_size": table["image_res"], "patch_size": 8, "num_frames": len(frames)}
        )
        processed = UMTVideoProcessor.from_model_config(config)(frames, return_tensors="pt")["pixel_values"][0]
        assert_same_pixels(processed, tensors[f"outputs/test_antialias0/{name}"])


def test_resized_crops_stay_within_their_bounds():
    transform, generator = ResizedCropTransform(224), torch.Generator().manual_seed(0)
    before = torch.random.get_rng_state()
    draws = [transform.sample(240, 320, generator) for _ in range(1000)]
    assert torch.equal(before, torch.random.get_rng_state())
    shares = torch.tensor([draw.height * draw.width / (240 * 320) for draw in draws])
    ratios = torch.tensor([draw.width / draw.height for draw in draws])
    assert 0.49 < shares.min() < 0.52 and 0.9 < shares.max() <= 1.0
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.36
    assert all(0 <= d.top <= 240 - d.height and 0 <= d.left <= 320 - d.width for d in draws)
    assert abs(sum(draw.flip for draw in draws) / 1000 - 0.5) < 0.05
    again = [transform.sample(240, 320, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert again[0] == again[1]
