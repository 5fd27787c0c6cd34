"""Schedules, learning-rate scaling and parameter groups against the published tables."""

import pytest
import torch

from tests.parity.multi_modality import build_model, load_case
from tests.parity.multi_modality import load_table as load_video_text_table
from tests.parity.reference import load_table
from umt_hf.hub_cards.convert_umt_checkpoint import _convert_tensor, _convert_video_text_tensor
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig, select_aligned_layers
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining, UMTVideoForVideoClassification
from umt_hf.training.optimization import (
    build_parameter_groups,
    compute_learning_rate,
    compute_learning_rate_share,
    scale_learning_rate,
)


@pytest.mark.parametrize("case", load_table("schedules")["cosine_scheduler"])
def test_learning_rate_of_every_step(case):
    arguments = case["arguments"]
    per_epoch = arguments["niter_per_ep"]
    warmup = arguments.get("warmup_epochs", 0) * per_epoch
    if arguments.get("warmup_steps", -1) > 0:
        warmup = arguments["warmup_steps"]
    for step, expected in enumerate(case["values"]):
        value = compute_learning_rate(
            step,
            peak=arguments["base_value"],
            minimum=arguments["final_value"],
            total_steps=arguments["epochs"] * per_epoch,
            warmup_steps=warmup,
            warmup_start=arguments.get("start_warmup_value", 0.0),
        )
        assert value == pytest.approx(expected, abs=1e-12, rel=1e-9), step


@pytest.mark.parametrize(
    "case", load_table("schedules")["lr_scaling_pretraining"] + load_table("schedules")["lr_scaling_finetuning"]
)
def test_rates_scale_with_clips_per_step(case):
    total = case["batch_size"] * case["world_size"] * case.get("update_freq", 1)
    for name, expected in case["scaled"].items():
        assert scale_learning_rate(case[name], total, case["num_sample"]) == pytest.approx(expected, rel=1e-12)


def test_aligned_layers():
    for depth, count, interval, _, expected, returned in load_table("returned_layers_and_mask_counts")[
        "returned_layers"
    ]["rows"]:
        if returned == count:
            assert select_aligned_layers(depth, count, interval) == expected
        else:
            # The published code silently aligns fewer layers than asked for; here it is an error.
            with pytest.raises(ValueError, match="do not fit"):
                select_aligned_layers(depth, count, interval)


def rename(name: str) -> list[str]:
    """Names that a published parameter has here; the position table is no parameter any more."""
    bare = name.removeprefix("encoder.")
    return [] if bare == "pos_embed" else list(_convert_tensor(bare, torch.empty(3, 1)))


@pytest.mark.parametrize("case", load_table("param_groups")["cases"], ids=lambda case: str(case["model"]))
def test_groups(case):
    fields = {"num_hidden_layers": 12, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 24}
    if case["model"].startswith("pretrain"):
        model = UMTVideoForPreTraining(UMTVideoConfig(**fields))
    else:
        model = UMTVideoForVideoClassification(UMTVideoConfig(**fields, num_labels=case["arguments"]["num_classes"]))
    groups = build_parameter_groups(model, case["weight_decay"], case["layer_decay"])
    ours = {name: group for group in groups for name in group["names"]}
    assert ours.keys() == dict(model.named_parameters()).keys()
    seen = set()
    for published in case["groups_in_order"]:
        for name in published["params"]:
            for renamed in rename(name):
                assert ours[renamed]["weight_decay"] == published["weight_decay"], renamed
                assert ours[renamed]["lr_scale"] == pytest.approx(published["lr_scale"], rel=1e-12), renamed
                assert ours[renamed]["name"] == published["name"]
                seen.add(renamed)
    assert seen == ours.keys()


def test_learnable_position_table_is_not_decayed():
    """The published skip list misses the pre-training model's table; decaying it is not repeated here."""
    config = UMTVideoConfig(
        num_hidden_layers=6,
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=24,
        learnable_position_embedding=True,
    )
    groups = build_parameter_groups(UMTVideoForPreTraining(config), 0.05)
    names = next(group["names"] for group in groups if group["weight_decay"] == 0)
    assert "vision_model.embeddings.position_embeddings" in names


@pytest.mark.parametrize("case", load_video_text_table("optimizer_scheduler")["schedule"])
def test_learning_rate_share_of_every_step(case):
    """Past the end the published cosine rises again; ours stays down."""
    total = case["num_training_steps"]
    for step, expected in enumerate(case["multiplier_for_step_0_1_2"][: total + 1]):
        share = compute_learning_rate_share(
            step,
            total_steps=total,
            warmup_steps=case["num_warmup_steps"],
            minimum_share=case["min_lr_multi"],
        )
        assert share == pytest.approx(expected, abs=1e-12, rel=1e-9), step


def test_video_text_groups():
    """All but the teacher, which the published code lists in the optimizer and never moves."""
    info, data = load_case("umt_pretrain_video")
    model = build_model(info, data["weights"], "video_text_pretraining")
    groups = build_parameter_groups(model, weight_decay=0.02)
    ours = {name: group["weight_decay"] for group in groups for name in group["names"]}
    seen = set()
    for group in load_video_text_table("optimizer_scheduler")["groups"]["default"]["groups"]:
        for name in group["names"]:
            if name.startswith("clip_teacher.") or name not in data["weights"]:
                assert name not in ours
                continue
            for converted in _convert_video_text_tensor(name, data["weights"][name]):
                assert ours[converted] == group["weight_decay"], name
                seen.add(converted)
    assert seen == ours.keys()
