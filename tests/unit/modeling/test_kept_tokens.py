"""Fewer tokens at inference: which ones are kept, the same in every class, and all of them as before."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from umt_hf import (
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextModel,
)
from umt_hf.modeling.losses_umt import normalize_features
from umt_hf.modeling.selection_umt_video import (
    build_feature_map,
    compute_frame_differences,
    count_kept,
    draw_numbers,
    select_tokens,
    spread_tokens,
)

from .tiny_models import FEATURES, PIXEL_CLASSES, VIDEO_CLASSES, build_inputs, build_model, list_features

GRID = (2, 4, 4)  # of the tiny models' clips
SELECTORS = ("random", "frame_difference", "teacher_saliency")


def draw_clips(batch: int = 3, frames: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def draw_saliency(batch: int = 2, frames: int = 2, patches: int = 16) -> torch.Tensor:
    return torch.rand(batch * frames, patches, generator=torch.Generator().manual_seed(1))


def choose(clips: torch.Tensor, selector: str, keep_ratio: float = 0.4, **options) -> torch.Tensor:
    grid = (clips.shape[1], clips.shape[3] // 8, clips.shape[4] // 8)
    if selector == "teacher_saliency":
        options["saliency"] = options.get("saliency", clips.abs().mean(2).unflatten(-1, (-1, 8)).mean(-1))
        options["saliency"] = options["saliency"].unflatten(2, (-1, 8)).mean(3).flatten(2)
    return select_tokens(clips, grid, keep_ratio, selector, **options)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("keep_ratio", "kept"), [(0.4, 7), (0.5, 8), (0.01, 1), (1.0, 16), (0.9375, 15)])
def test_each_frame_keeps_as_many_tokens(selector, keep_ratio, kept):
    indices = choose(draw_clips(), selector, keep_ratio)
    assert indices.shape == (3, 4 * kept) and bool((indices.diff(dim=1) > 0).all())
    frames = (indices // 16).view(3, 4, kept)
    assert torch.equal(frames, torch.arange(4)[None, :, None].expand(3, 4, kept))
    assert count_kept(16, keep_ratio) == kept


def test_shares_are_counted_as_masks_count_them():
    assert [count_kept(196, share) for share in (0.2, 0.5, 0.1)] == [196 - int(196 * (1 - s)) for s in (0.2, 0.5, 0.1)]
    assert count_kept(10, 0.3) == 3 and count_kept(100, 0.07) == 7  # not one more by the rounding of floats


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_clip_keeps_the_same_tokens_in_any_batch(selector):
    clips = torch.cat([draw_clips(5), draw_clips(2).round(), draw_clips(1)[:, :1].expand(-1, 4, -1, -1, -1)])
    together = choose(clips, selector)
    for row in range(len(clips)):
        assert torch.equal(choose(clips[row : row + 1], selector)[0], together[row])
    assert torch.equal(choose(clips.flip(0), selector), together.flip(0))
    assert torch.equal(choose(clips, selector), together)


def test_random_choices_follow_the_seed_alone():
    clips, state = draw_clips(2), torch.get_rng_state()
    one = choose(clips, "random", seed=0)
    assert torch.equal(one[0], one[1]) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(choose(clips, "random", seed=1), one)
    assert torch.equal(choose(draw_clips(2, seed=9), "random", seed=0), one)
    # Recorded: another version of PyTorch or another device must choose the same.
    assert draw_numbers(4, 0).tolist() == [476860346, 1381253517, 2086030420, 1668920578]
    # Every place of every frame is as likely as any other.
    counts = torch.zeros(64)
    for seed in range(400):
        counts[choose(clips[:1], "random", 0.25, seed=seed)[0]] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, 8.7 the standard deviation
    numbers = draw_numbers(20_000, 5)
    assert len(numbers.unique()) == 20_000 and abs(float(numbers.double().mean()) / 2**30 - 1) < 0.02
    neighbours = torch.stack([numbers[:-1], numbers[1:]]).double().corrcoef()[0, 1]
    assert abs(float(neighbours)) < 0.03


def test_differences_keep_what_moves():
    clips = torch.zeros(1, 4, 3, 32, 32)
    for frame in range(4):  # a bright square that moves right, a patch per frame, in the second row
        clips[0, frame, :, 8:16, 8 * frame : 8 * frame + 8] = 1
    differences = compute_frame_differences(clips, (4, 4, 4))
    expected = torch.zeros(4, 4)
    expected[0, :2], expected[3, 2:] = 1, 1  # one neighbour
    expected[1, 0], expected[1, 1], expected[1, 2] = 1, 2, 1
    expected[2, 1], expected[2, 2], expected[2, 3] = 1, 2, 1
    torch.testing.assert_close(differences[0, :, 4:8], expected)
    assert differences[0, :, :4].sum() == differences[0, :, 8:].sum() == 0
    kept = choose(clips, "frame_difference", 0.0625)  # one of 16
    assert kept.tolist()[0][1:3] == [16 + 4 + 1, 32 + 4 + 2]
    assert kept[0, 0] in (4, 5) and kept[0, 3] - 48 in (6, 7)
    halved = compute_frame_differences(clips, (2, 4, 4))
    torch.testing.assert_close(halved, differences.unflatten(1, (2, 2)).mean(2))


def test_equal_patches_are_drawn():
    still = draw_clips(1)[:, :1].expand(2, 4, -1, -1, -1)
    assert torch.equal(choose(still, "frame_difference"), choose(still, "random"))
    assert torch.equal(choose(still[:, :1], "frame_difference"), choose(still[:, :1], "random"))
    flat = torch.ones(2, 4, 16)
    found = select_tokens(still, (4, 4, 4), 0.4, "teacher_saliency", saliency=flat)
    assert torch.equal(found, choose(still, "random"))


def test_saliency_keeps_the_largest():
    clips, saliency = draw_clips(2, 2), draw_saliency()
    found = select_tokens(clips, GRID, 0.25, "teacher_saliency", saliency=saliency)
    best = saliency.view(2, 2, 16).topk(4, dim=-1).indices.sort(dim=-1).values + torch.tensor([0, 16])[:, None]
    assert torch.equal(found, best.flatten(1))
    assert torch.equal(select_tokens(clips, GRID, 0.25, "teacher_saliency", saliency=saliency.view(2, 2, 16)), found)
    in_tubelets = select_tokens(clips, (1, 4, 4), 0.25, "teacher_saliency", saliency=saliency)
    assert torch.equal(in_tubelets, saliency.view(2, 2, 16).mean(1).topk(4, dim=-1).indices.sort(dim=-1).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "teacher_saliency"}, "needs saliency, that of UMTTeacher"),
        ({"selector": "random", "saliency": draw_saliency()}, "saliency is for token_selector='teacher_saliency'"),
        ({"selector": "teacher_saliency", "saliency": torch.ones(4, 9)}, r"a row of 16 patches .* got shape \(4, 9\)"),
        ({"selector": "teacher_saliency", "saliency": torch.ones(3, 16)}, r"each frame of the 2 clips"),
        ({"selector": "loudness"}, "token_selector must be 'random', 'frame_difference' or 'teacher_saliency'"),
        ({"keep_ratio": 0.0}, "keep_ratio must be above 0 and at most 1, got 0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio must be above 0 and at most 1, got 1.5"),
        ({"keep_ratio": float("nan")}, "keep_ratio must be above 0 and at most 1, got nan"),
    ],
)
def test_choices_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(draw_clips(2, 2), GRID, **{"keep_ratio": 0.5} | options)


def test_spread_tokens_are_at_their_places():
    tokens, indices = torch.randn(2, 3, 5), torch.tensor([[0, 2, 5], [1, 3, 4]])
    spread = spread_tokens(tokens, indices, 6)
    assert spread.shape == (2, 6, 5)
    for row in range(2):
        assert torch.equal(spread[row, indices[row]], tokens[row])
        assert not spread[row, [i for i in range(6) if i not in indices[row]]].any()


def test_a_map_averages_what_a_place_has():
    tokens, indices = torch.randn(1, 4, 3), torch.tensor([[0, 1, 5, 6]])  # 2 frames of 4 patches
    found = build_feature_map(tokens, (2, 2, 2), indices)
    assert found.shape == (1, 3, 2, 2)
    torch.testing.assert_close(found[0, :, 0, 0], tokens[0, 0])
    torch.testing.assert_close(found[0, :, 0, 1], (tokens[0, 1] + tokens[0, 2]) / 2)
    torch.testing.assert_close(found[0, :, 1, 0], tokens[0, 3])
    assert not found[0, :, 1, 1].any()
    everything = torch.randn(1, 8, 3)
    expected = build_feature_map(everything, (2, 2, 2))
    torch.testing.assert_close(build_feature_map(everything, (2, 2, 2), torch.arange(8)[None]), expected)


# ------------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("selector", ["random", "frame_difference"])
@pytest.mark.parametrize("model_class", PIXEL_CLASSES)
@torch.no_grad()
def test_every_class_keeps_tokens_and_all_of_them_bit_by_bit(model_class, selector):
    model, inputs = build_model(model_class), build_inputs(model_class)
    expected = list_features(model(**inputs))
    model.config.keep_ratio, model.config.token_selector = 1, selector
    for name, value in list_features(model(**inputs)).items():
        assert torch.equal(value, expected[name]), name
    model.config.keep_ratio = 0.4
    found = list_features(model(**inputs))
    assert found.keys() == expected.keys()
    changed = [
        name for name in found if found[name].shape != expected[name].shape or (found[name] != expected[name]).any()
    ]
    assert changed  # something depends on the video
    kept = [name for name in FEATURES if name in found and found[name].shape != expected[name].shape]
    assert set(kept) <= {"last_hidden_state", "aligned_features"}  # those of all tokens


@pytest.mark.parametrize("model_class", PIXEL_CLASSES)
@torch.no_grad()
def test_every_class_takes_a_teachers_saliency(model_class):
    model, inputs, saliency = build_model(model_class), build_inputs(model_class), draw_saliency()
    model.config.keep_ratio, model.config.token_selector = 0.25, "teacher_saliency"
    found = list_features(model(**inputs, saliency=saliency))
    other = list_features(model(**inputs, saliency=1 - saliency))
    assert any(not torch.equal(value, other[name]) for name, value in found.items())
    with pytest.raises(ValueError, match="needs saliency"):
        model(**inputs)
    if hasattr(model, "get_video_features"):
        model.get_video_features(inputs["pixel_values"], saliency=saliency)
    if hasattr(model, "rank_answers"):
        ids = inputs["input_ids"]
        model.generate(inputs["pixel_values"], ids, saliency=saliency, max_new_tokens=2)
        answers = (ids, torch.ones_like(ids))
        model.rank_answers(inputs["pixel_values"], ids, None, *answers, top_k=2, saliency=saliency)


@pytest.mark.parametrize("selector", ["random", "frame_difference"])
@torch.no_grad()
def test_the_encoder_gives_what_it_gives_for_these_indices(selector):
    model = build_model(UMTVideoModel)
    clips = build_inputs(UMTVideoModel)["pixel_values"]
    expected = model(clips, visible_indices=select_tokens(clips, GRID, 0.4, selector))
    assert expected.kept_indices is None
    model.config.keep_ratio, model.config.token_selector = 0.4, selector
    found = model(clips)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.kept_indices, select_tokens(clips, GRID, 0.4, selector))
    # A mask or indices say it all; then the share does not count.
    given = model(clips, visible_indices=torch.tensor([[0, 3], [1, 2]]))
    assert given.last_hidden_state.shape[1] == 2 and given.kept_indices is None
    # A clip gives the same alone.
    torch.testing.assert_close(model(clips[1:]).last_hidden_state[0], found.last_hidden_state[1])


@torch.no_grad()
def test_frames_are_pooled_over_the_tokens_they_keep():
    model = build_model(UMTVideoTextModel)
    clips = build_inputs(UMTVideoTextModel)["pixel_values"]
    model.config.keep_ratio = 0.4
    found = model.get_video_features(clips)
    frames = found.last_hidden_state.unflatten(1, (2, 7)).mean(2)
    expected = normalize_features(model.video_projection(model.video_norm(frames)))
    torch.testing.assert_close(found.frame_embeds, expected)
    torch.testing.assert_close(found.pooler_output, expected.mean(1))


@torch.no_grad()
def test_boxes_are_read_on_a_map_with_zeros_where_nothing_is_kept():
    model, inputs = build_model(UMTVideoForActionDetection), build_inputs(UMTVideoForActionDetection)
    clips = torch.zeros_like(inputs["pixel_values"])
    clips[:, 1, :, :16] = torch.randn(2, 3, 16, 32)  # only the upper half changes
    model.config.keep_ratio = 0.5
    below = torch.tensor([[[0.0, 20.0, 32.0, 32.0]]]).expand(2, -1, -1)
    logits = model(clips, below).logits
    torch.testing.assert_close(logits, model.classifier.bias.expand(2, 1, -1))
    above = model(clips, torch.tensor([[[0.0, 0.0, 32.0, 12.0]]]).expand(2, -1, -1)).logits
    assert not torch.equal(above[0], above[1])


def test_alignment_compares_the_kept_tokens():
    torch.manual_seed(0)
    model = build_model(UMTVideoForPreTraining)
    clips = build_inputs(UMTVideoForPreTraining)["pixel_values"]
    targets = torch.randn(2, 2, 32, 16)
    indices = select_tokens(clips, GRID, 0.4, "frame_difference")
    expected = model(clips, visible_indices=indices, teacher_features=targets)
    model.config.keep_ratio = 0.4
    found = model(clips, teacher_features=targets)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.aligned_features, expected.aligned_features)
    stage2, inputs = build_model(UMTVideoTextForPreTraining), build_inputs(UMTVideoTextForPreTraining)
    torch.manual_seed(0)
    expected = stage2(**inputs, visible_indices=indices, teacher_features=targets, return_loss=True)
    stage2.config.keep_ratio = 0.4
    torch.manual_seed(0)
    found = stage2(**inputs, teacher_features=targets, return_loss=True)
    assert torch.equal(found.uta_loss, expected.uta_loss)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("model_class", [UMTVideoModel, UMTVideoForVideoClassification, UMTVideoForActionDetection])
@torch.no_grad()
def test_compiles_to_one_graph_without_another_for_the_same_share(model_class, selector):
    torch._dynamo.reset()
    model, inputs = build_model(model_class), build_inputs(model_class)
    if model_class is UMTVideoForActionDetection:  # RoIAlign is not what is tried here
        model, inputs = model.vision_model, {"pixel_values": inputs["pixel_values"]}
    model.config.keep_ratio, model.config.token_selector = 0.4, selector
    if selector == "teacher_saliency":
        inputs["saliency"] = draw_saliency()
    # Within a function: PyTorch 2.6 cannot put together what a compiled encoder itself returns.
    name = "logits" if model_class is UMTVideoForVideoClassification else "last_hidden_state"
    compiled = torch.compile(lambda given: model(**given)[name], backend="aot_eager", fullgraph=True)
    for scale in (1.0, 2.0, -1.0):
        inputs["pixel_values"] = inputs["pixel_values"] * scale + 0.1
        with torch._dynamo.config.patch(error_on_recompile=scale != 1.0):
            found = compiled(inputs)
        torch.testing.assert_close(found, model(**inputs)[name])
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize("model_class", PIXEL_CLASSES)
def test_the_share_is_set_when_loading_saved_and_missing_in_old_folders(model_class, tmp_path):
    build_model(model_class).save_pretrained(tmp_path / "model")
    loaded = model_class.from_pretrained(tmp_path / "model", keep_ratio=0.5, token_selector="random")
    assert (loaded.config.keep_ratio, loaded.config.token_selector) == (0.5, "random")
    loaded.save_pretrained(tmp_path / "saved")
    again = model_class.from_pretrained(tmp_path / "saved")
    assert (again.config.keep_ratio, again.config.token_selector) == (0.5, "random")
    vision = getattr(again.config, "vision_config", again.config)
    assert vision.keep_ratio == 0.5
    if model_class not in VIDEO_CLASSES:
        assert "keep_ratio" not in again.config.to_dict()  # but in its part, once
    encoder = UMTVideoModel.from_pretrained(tmp_path / "model", keep_ratio=0.5)
    assert encoder.config.keep_ratio == 0.5
    for name in ("keep_ratio", "token_selector", "token_selector_seed"):
        remove_field(tmp_path / "saved" / "config.json", name)
    old = model_class.from_pretrained(tmp_path / "saved")
    assert (old.config.keep_ratio, old.config.token_selector) == (1.0, "frame_difference")
    auto = AutoModel.from_pretrained(tmp_path / "model", keep_ratio=0.25)
    assert auto.config.keep_ratio == 0.25


def remove_field(config: Path, name: str) -> None:
    lines = [line for line in config.read_text().splitlines() if f'"{name}"' not in line]
    config.write_text("\n".join(lines).replace(",\n}", "\n}").replace(",\n  }", "\n  }"))


@pytest.mark.parametrize("wrong", [0, -0.5, 1.5, float("nan")])
def test_shares_outside_their_range_are_refused(wrong):
    with pytest.raises(StrictDataclassError, match="keep_ratio must be above 0 and at most 1"):
        UMTVideoTextConfig(vision_config={"keep_ratio": wrong})
    model = build_model(UMTVideoModel)
    model.config.keep_ratio = wrong
    with pytest.raises(ValueError, match="keep_ratio must be above 0 and at most 1"):
        model(**build_inputs(UMTVideoModel))
