"""Augmentation of classification: what is drawn, for how long it holds, and what it does to pixels and targets."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from umt_hf.processing.classification_transforms import (
    OPERATIONS,
    ClassificationTransform,
    ClipMix,
    ClipRandAugment,
    erase_box,
    sample_erased_box,
)
from umt_hf.training.clips import build_generator

POLICY = "rand-m7-n4-mstd0.5-inc1"


def make_frames(num_frames: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.randint(256, (num_frames, 3, height, width), generator=build_generator(1), dtype=torch.uint8)


def test_operations_are_drawn_as_published():
    """4 draws of 15 operations, each left out half the time; magnitudes around 7, directions even."""
    augment, generator = ClipRandAugment(POLICY), build_generator(0)
    drawn = [augment.sample(generator) for _ in range(4000)]
    operations = [operation for clip in drawn for operation in clip]
    assert max(len(clip) for clip in drawn) == 4 and min(len(clip) for clip in drawn) == 0
    assert len(operations) / 4000 == pytest.approx(2, abs=0.06)
    counts = {name: sum(operation.name == name for operation in operations) for name in OPERATIONS}
    assert len(counts) == 15 and min(counts.values()) > 0.8 * len(operations) / 15
    magnitudes = np.array([operation.magnitude for operation in operations])
    assert magnitudes.mean() == pytest.approx(7, abs=0.03) and magnitudes.std() == pytest.approx(0.5, abs=0.03)
    assert np.mean([operation.sign for operation in operations]) == pytest.approx(0, abs=0.05)
    strong = ClipRandAugment("rand-m9.8-n2-mstd1-inc1")
    assert max(operation.magnitude for _ in range(200) for operation in strong.sample(generator)) == 10


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_the_same_to_every_frame(name):
    frame = Image.fromarray(make_frames(1)[0].permute(1, 2, 0).numpy())
    assert OPERATIONS[name](frame, 0.7, 1).size == frame.size
    frames = make_frames(1).expand(3, -1, -1, -1)
    operation = next(
        operation
        for seed in range(10_000)
        for operation in ClipRandAugment(POLICY).sample(build_generator(seed))
        if operation.name == name
    )
    changed = ClipRandAugment.apply(frames, [operation])
    assert changed.dtype == torch.uint8 and (changed == changed[0]).all()


def test_operations_against_hand_computed_pixels():
    grey = Image.new("RGB", (20, 10), (100, 127, 200))
    assert OPERATIONS["SolarizeAdd"](grey, 0.7, 1).getpixel((0, 0)) == (177, 204, 200)  # + int(77) below 128
    assert OPERATIONS["Solarize"](grey, 0.7, 1).getpixel((0, 0)) == (155, 128, 55)  # all above 256 - 179 = 77
    assert OPERATIONS["Posterize"](grey, 0.7, 1).getpixel((0, 0)) == (64, 64, 192)  # 4 - int(2.8) = 2 bits
    assert OPERATIONS["Invert"](grey, 0.7, 1).getpixel((0, 0)) == (155, 128, 55)
    assert OPERATIONS["Brightness"](grey, 0.5, 1).getpixel((0, 0)) == (145, 184, 255)  # times 1.45
    assert OPERATIONS["Brightness"](grey, 0.5, -1).getpixel((0, 0)) == (55, 69, 110)  # times 0.55
    moved = OPERATIONS["TranslateX"](grey, 1.0, 1)  # by 0.45 * 20 = 9 pixels to the left, the rest is grey
    assert moved.getpixel((3, 5)) == (100, 127, 200) and moved.getpixel((15, 5)) == (128, 128, 128)


def test_unknown_policy():
    with pytest.raises(ValueError, match="rand-m7-n4-mstd0.5-inc1"):
        ClipRandAugment("rand-m9")


def test_one_draw_a_clip_decided_by_its_generator_alone():
    transform = ClassificationTransform(32, rand_augment=POLICY, erasing_probability=0.0)
    same = make_frames(1).expand(4, -1, -1, -1)
    outputs = []
    for seed in range(6):
        torch.manual_seed(seed)
        clip = transform(same, build_generator(7, seed))
        assert clip.shape == (4, 3, 32, 32) and clip.dtype == torch.float32
        assert torch.allclose(clip, clip[:1].expand_as(clip), atol=1e-6)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert torch.equal(transform(same, build_generator(7, seed)), clip)
        assert torch.equal(torch.get_rng_state(), state)
        outputs.append(clip)
    assert len({tuple(output[0, 0, 0, :4].tolist()) for output in outputs}) == 6


def test_crops_and_flips_are_in_range():
    transform, generator = ClassificationTransform(32), build_generator(3)
    crops = [transform.sample(240, 320, generator) for _ in range(1500)]
    shares = [crop.height * crop.width / (240 * 320) for crop in crops]
    assert 0.075 < min(shares) < 0.12 and 0.9 < max(shares) <= 1
    inner = [crop.width / crop.height for crop in crops]
    assert min(inner) > 0.7 and max(inner) < 1.4
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.5, abs=0.05)
    assert not any(ClassificationTransform(32, flip_probability=0).sample(9, 9, generator).flip for _ in range(50))


def test_erased_boxes():
    generator = build_generator(5)
    boxes = [sample_erased_box(224, 224, generator) for _ in range(2000)]
    shares = np.array([tall * wide / 224**2 for _, _, tall, wide in boxes])
    aspects = np.array([tall / wide for _, _, tall, wide in boxes])
    assert 0.018 < shares.min() < 0.03 and 0.3 < shares.max() < 0.336
    assert aspects.min() > 0.28 and aspects.max() < 3.6
    assert abs(np.log(aspects).mean()) < 0.05
    assert all(top + tall <= 224 and left + wide <= 224 for top, left, tall, wide in boxes)
    clip = torch.zeros(4, 3, 64, 64)
    erase_box(clip, (10, 20, 30, 40), generator)
    assert (clip[..., 10:40, 20:60] != 0).all() and not clip[..., :10, :].any() and not clip[..., :20].any()
    assert clip[..., 10:40, 20:60].std() == pytest.approx(1, abs=0.03)
    assert not torch.equal(clip[0], clip[1])  # one box, fresh noise


def test_share_of_erased_clips():
    transform = ClassificationTransform(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), erasing_probability=0.25)
    frames = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    erased = [transform(frames, build_generator(seed))[0, 0].unique().numel() > 1 for seed in range(400)]
    assert np.mean(erased) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("kind,alphas", [("MixUp", (0.8, 0.0)), ("CutMix", (0.0, 1.0))])
def test_mixing_equals_torchvisions_own_frame_by_frame(kind, alphas):
    """Torchvision on the images of one frame, with the draw that the clip had."""
    clips = torch.randn(4, 3, 3, 16, 16, generator=build_generator(0))
    labels = torch.tensor([0, 2, 1, 2])
    before = clips.clone()
    mixed, targets = ClipMix(3, *alphas)(clips, labels, build_generator(11))
    generator = build_generator(11)
    torch.randint(1, (), generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    for frame in range(3):
        torch.manual_seed(seed)
        transform = getattr(v2, kind)(alpha=max(alphas), num_classes=3)
        expected, soft = transform(tv_tensors.Image(before[:, frame]), labels)
        torch.testing.assert_close(mixed[:, frame], expected.as_subclass(torch.Tensor))
        torch.testing.assert_close(targets, soft)
    assert torch.equal(clips, before) and type(mixed) is torch.Tensor


def test_cutmix_targets_are_areas_and_both_kinds_have_half_of_the_batches():
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 2, 1, 20, 20)
    mix, kinds = ClipMix(4, 0.8, 1.0), []
    for seed in range(300):
        mixed, targets = mix(clips, torch.arange(4), build_generator(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        own = targets.diagonal()
        partner = torch.stack([targets[i, i - 1] for i in range(4)])
        values = torch.arange(4.0)
        expected = own * values + partner * values.roll(1)  # the mean of both kinds
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3, 4)), expected, atol=1e-4, rtol=1e-4)
        is_cut = all(set(mixed[i].unique().tolist()) <= {float(i), float((i - 1) % 4)} for i in range(4))
        if not math.isclose(own[0].item(), 1.0) and not math.isclose(own[0].item(), 0.0):
            kinds.append(is_cut)
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="both 0"):
        ClipMix(3, 0, 0)
