"""The tiny CLIP: its captions, its loss, and that a short training learns and loads everywhere."""

import json

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from umt_hf.modeling.teacher_umt_video import UMTTeacher
from umt_hf.training.data.moving_shapes import write_moving_shapes
from umt_hf.training.teacher import (
    CAPTIONS,
    TeacherArguments,
    build_tokenizer,
    compute_contrastive_loss,
    load_frames,
    train_teacher,
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return write_moving_shapes(folder, num_train_clips=40, num_validation_clips=20, num_test_clips=1)


def test_captions_say_what_the_frame_shows(shapes):
    frames = load_frames(shapes, "train", 3)
    clips = json.loads((shapes / "train_boxes.json").read_text())[:3]
    assert frames.pixels.dtype == torch.uint8 and len(frames.pixels) == len(frames.caption_ids) == 3 * 12
    for i, clip in enumerate(clips):
        (shape,) = clip["objects"]
        for k in range(12):
            caption = CAPTIONS[frames.caption_ids[12 * i + k]]
            assert caption.startswith(f"a {shape['color']} {shape['shape']} at the ")
            left, top, right, bottom = shape["boxes"][2 * k]
            row, column = caption.split()[-2:]
            assert ("top", "upper", "lower", "bottom").index(row) == int((top + bottom) / 2 / clip["height"] * 4)
            assert ("leftmost", "left", "right", "rightmost").index(column) == int(
                (left + right) / 2 / clip["width"] * 4
            )


def test_equal_captions_are_positives_of_each_other():
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    as_equal = compute_contrastive_loss(logits, torch.tensor([7, 7, 1]))
    as_distinct = compute_contrastive_loss(logits, torch.tensor([7, 8, 1]))
    assert as_equal == pytest.approx(as_distinct.item(), abs=1e-6)  # symmetric scores: the same loss
    sharp = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert compute_contrastive_loss(sharp, torch.tensor([1, 2])) < compute_contrastive_loss(
        sharp, torch.tensor([1, 1])
    )


def test_tokenizer_wraps_every_caption_without_unknown_words():
    tokenizer = build_tokenizer()
    ids = tokenizer(list(CAPTIONS))["input_ids"]
    assert len({tuple(row) for row in ids}) == len(CAPTIONS)
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_short_training_learns_colours_and_loads(shapes, tmp_path):
    arguments = TeacherArguments(
        data=str(shapes), output_dir=str(tmp_path), num_clips=40, max_steps=150, batch_size=32, num_hidden_layers=2
    )
    accuracy = train_teacher(arguments)
    assert accuracy["color"] > 0.5  # chance is 1 in 6
    teacher = UMTTeacher.from_pretrained(str(tmp_path), num_aligned_layers=2)
    outputs = teacher(torch.randn(1, 2, 3, 64, 64))
    assert outputs.features.shape == (2, 1, 32, 64) and outputs.saliency.shape == (2, 16)
    assert len(CLIPModel.from_pretrained(tmp_path).text_model.state_dict()) > 0
    assert AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS[0])["input_ids"][0] == build_tokenizer().bos_token_id
