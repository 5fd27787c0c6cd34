"""The tiny CLIP of the embedded data: its text side, its loss, and the folder that it leaves behind."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

from umt_hf import UMTVideoConfig, UMTVideoModel
from umt_hf.moving_shapes import tiny_clip as teacher
from umt_hf.moving_shapes.render import NUM_FRAMES, write_moving_shapes
from umt_hf.moving_shapes.tiny_clip import ATTRIBUTES, CAPTIONS, TinyCLIPArguments
from umt_hf.teachers.teacher import UMTTeacher


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "data"
    return write_moving_shapes(directory, num_train_clips=24, num_validation_clips=2, num_test_clips=1)


@pytest.fixture(scope="module")
def arguments(data, tmp_path_factory):
    output_dir = str(tmp_path_factory.mktemp("clip"))
    return TinyCLIPArguments(data=str(data), output_dir=output_dir, max_steps=3, batch_size=8, num_train_clips=3)


@pytest.fixture(scope="module")
def folder(arguments):
    accuracy = teacher.train_teacher(arguments)
    assert set(accuracy) == set(ATTRIBUTES)
    return arguments.output_dir


def test_every_word_of_a_caption_reaches_its_embedding(arguments):
    """Text is pooled at the end of the caption: changing any one attribute moves the embedding."""
    torch.manual_seed(0)
    tokenizer = teacher.build_word_tokenizer()
    model = teacher.build_clip(arguments, tokenizer).eval()
    embeddings = model.text_model(**teacher.tokenize(tokenizer, range(len(CAPTIONS)))).pooler_output
    embeddings = embeddings.unflatten(0, [len(words) for words in ATTRIBUTES.values()])
    for axis, words in enumerate(ATTRIBUTES.values()):
        values = embeddings.movedim(axis, 0).flatten(1)
        for i in range(1, len(words)):
            assert (values[i] - values[0]).abs().max() > 1e-3


def test_tokenizer_knows_every_word():
    tokenizer = teacher.build_word_tokenizer()
    ids = tokenizer(list(CAPTIONS), return_tensors="pt")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.eos_token_id).all()
    assert len(set(map(tuple, ids.tolist()))) == len(CAPTIONS)


def test_caption_names_what_the_box_shows():
    shape = {"color": "green", "shape": "star"}
    at_top_right = teacher._compute_caption_id(shape, [50, 0, 64, 10], 64, 64)
    assert CAPTIONS[at_top_right] == "a green star at the top rightmost"
    below_the_middle = teacher._compute_caption_id(shape, [20, 30, 30, 44], 64, 64)
    assert CAPTIONS[below_the_middle] == "a green star at the lower left"


def test_frames_carry_the_captions_of_their_boxes(data):
    frames = teacher.load_frames(data, "train", 3)
    clips = json.loads((data / "train_boxes.json").read_text())[:3]
    assert frames.pixels.dtype == torch.uint8 and frames.pixels.shape == (3 * NUM_FRAMES // 2, 3, 64, 64)
    captions = [CAPTIONS[i] for i in frames.caption_ids]
    for clip in clips:
        (shape,) = clip["objects"]
        for box in shape["boxes"][::2]:
            left, top, right, bottom = box
            row = ATTRIBUTES["row"][int((top + bottom) / 2 / clip["height"] * 4)]
            column = ATTRIBUTES["column"][int((left + right) / 2 / clip["width"] * 4)]
            assert captions.pop(0) == f"a {shape['color']} {shape['shape']} at the {row} {column}"


def test_contrastive_loss_treats_equal_captions_as_positives():
    logits = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 0.0], [2.0, 0.0, 5.0]])
    distinct = teacher.compute_contrastive_loss(logits, torch.tensor([7, 8, 9]))
    targets = torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(distinct, (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2)
    # Two frames of one caption share the target: with equal logits each gets half, at a cost of log 2.
    same = teacher.compute_contrastive_loss(torch.full((2, 2), 3.0), torch.tensor([5, 5]))
    assert same.item() == pytest.approx(math.log(2))


def test_folder_loads_with_every_class_that_needs_it(folder):
    model = CLIPModel.from_pretrained(folder).eval()
    tower, report = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(tower.eval()(pixel_values=pixels).image_embeds, expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(CAPTIONS[0])["input_ids"] == teacher.build_word_tokenizer()(CAPTIONS[0])["input_ids"]
    processor = CLIPImageProcessor.from_pretrained(folder)
    frame = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = torch.as_tensor(processor(frame, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(seen, teacher.normalize(frame[None])[0], atol=1e-5, rtol=0)


def test_folder_serves_as_the_frozen_teacher(folder):
    frozen = UMTTeacher.from_pretrained(folder, num_aligned_layers=2)
    assert (frozen.image_size, frozen.patch_size, frozen.grid_size) == (64, 16, 4)
    output = frozen(torch.randn(2, 8, 3, 64, 64))
    assert output.features.shape == (2, 2, 8 * 16, 64)
    assert output.saliency.shape == (2 * 8, 16)
    assert (output.saliency > 0).all() and (output.saliency.sum(dim=1) < 1).all()


def test_other_models_are_no_teacher(folder, tmp_path):
    UMTVideoModel(
        UMTVideoConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_aligned_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'umt_video'; the teacher must be a CLIP"):
        UMTTeacher.from_pretrained(str(tmp_path))
    half = shutil.copytree(folder, tmp_path / "half")
    weights = load_file(half / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not a complete CLIP vision tower.* lacks visual_projection.weight"):
        UMTTeacher.from_pretrained(str(tmp_path / "half"), num_aligned_layers=2)


def test_a_seed_fixes_the_weights(arguments, folder, tmp_path):
    for seed, is_same in ((0, True), (1, False)):
        again = dataclasses.replace(arguments, output_dir=str(tmp_path / str(seed)), seed=seed)
        teacher.train_teacher(again)
        first, second = (CLIPModel.from_pretrained(path).state_dict() for path in (folder, again.output_dir))
        equal = [torch.equal(first[name], second[name]) for name in first]
        assert (
            all(equal)
            if is_same
            else not any(torch.equal(first[name], second[name]) for name in first if name.endswith("proj.weight"))
        )


@pytest.mark.slow
def test_training_learns_the_colors(arguments, data):
    torch.manual_seed(0)
    tokenizer = teacher.build_word_tokenizer()
    args = dataclasses.replace(arguments, max_steps=120, batch_size=32, num_train_clips=24)
    model = teacher.build_clip(args, tokenizer)
    frames = teacher.load_frames(data, "train", args.num_train_clips)
    assert len(frames.pixels) == len(frames.caption_ids) == 24 * NUM_FRAMES // 2
    teacher.fit(model, tokenizer, frames, args)
    assert teacher.compute_zero_shot_accuracy(model, tokenizer, frames)["color"] > 0.5  # 1 / 6 by chance
