"""Classifiers at several clip shapes, position tables, and equality with Transformers' own VideoMAE classifier."""

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from tests.parity.reference import load_case, load_table
from umt_hf.hub_cards.convert_umt_checkpoint import convert_state_dict
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.modeling_umt_video import (
    UMTVideoForVideoClassification,
    compute_sinusoid_table,
    interpolate_position_table,
)

CASES = [
    "classify_4f_64",
    "classify_8f_224",
    "classify_16f_224",
    "classify_8f_384",
    "classify_16f_384",
    "classify_32f_112",
]


def build_classifier(arguments: dict, weights: dict) -> UMTVideoForVideoClassification:
    config = UMTVideoConfig(
        image_size=arguments["img_size"],
        patch_size=arguments["patch_size"],
        num_frames=arguments["all_frames"],
        tubelet_size=arguments["tubelet_size"],
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=int(arguments["embed_dim"] * arguments["mlp_ratio"]),
        num_labels=arguments["num_classes"],
    )
    model = UMTVideoForVideoClassification(config).eval()
    model.load_state_dict(convert_state_dict(weights, config, "classification"))
    return model


def read_video(info: dict, data: dict) -> torch.Tensor:
    video = data["inputs"]["video_int8"].float() / info["divide_by"]
    video = video.repeat_interleave(info["upsample"], -1).repeat_interleave(info["upsample"], -2)
    return video.transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_logits_features_and_position_table(name):
    info, data = load_case(name)
    model = build_classifier(info["constructor"], data["weights"])
    video = read_video(info, data)
    with torch.no_grad():
        outputs = model.vision_model(video)
        features = model.fc_norm(outputs.pooler_output)
        logits = model(video).logits
    torch.testing.assert_close(features, data["outputs"]["features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, data["outputs"]["logits"], atol=1e-5, rtol=0)

    embeddings = model.vision_model.embeddings
    table = embeddings.compute_position_embeddings(embeddings.patch_embeddings.compute_grid(video))[0]
    assert list(table.shape) == info["pos_table_shape"]
    torch.testing.assert_close(table[:50], data["outputs"]["pos_first50"], atol=2e-6, rtol=0)
    torch.testing.assert_close(table[-50:], data["outputs"]["pos_last50"], atol=2e-6, rtol=0)
    torch.testing.assert_close(table.double().sum(1).float(), data["outputs"]["pos_row_sum"], atol=2e-5, rtol=0)
    torch.testing.assert_close(
        table.double().abs().sum(1).float(), data["outputs"]["pos_row_abs_sum"], atol=2e-5, rtol=0
    )


def test_stored_table_carried_to_another_shape():
    info, data = load_case("transfer_position_table")
    old, new = info["checkpoint"], info["model"]
    table = interpolate_position_table(
        data["inputs"]["pos_embed_checkpoint"],
        (old["frames"], old["img_size"] // 16, old["img_size"] // 16),
        (new["frames"], new["img_size"] // 16, new["img_size"] // 16),
    )
    torch.testing.assert_close(table, data["outputs"]["pos_embed_loaded"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["classify_16f_224", "classify_8f_384"])
def test_stored_position_parameter_is_checked(name):
    """16-frame and 384-pixel classifiers store the table: accepted if it is the computed one, else refused."""
    info, data = load_case(name)
    arguments = info["constructor"]
    side = arguments["img_size"] // 16
    table = compute_sinusoid_table(1568, arguments["embed_dim"])
    table = interpolate_position_table(table, (8, 14, 14), (arguments["all_frames"], side, side))
    build_classifier(arguments, {**data["weights"], "pos_embed": table})
    with pytest.raises(ValueError, match="learnable_position_embedding"):
        build_classifier(arguments, {**data["weights"], "pos_embed": table.flip(1)})
    with pytest.raises(ValueError, match="rows"):
        build_classifier(arguments, {**data["weights"], "pos_embed": table[:, :-1]})


def test_equals_transformers_videomae_classifier():
    info, data = load_case("classify_8f_224")
    ours = build_classifier(info["constructor"], data["weights"])
    arguments = info["constructor"]
    config = VideoMAEConfig(
        image_size=224,
        num_frames=8,
        tubelet_size=1,
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=4 * arguments["embed_dim"],
        layer_norm_eps=1e-6,
        num_labels=arguments["num_classes"],
    )
    theirs = VideoMAEForVideoClassification(config).eval()
    theirs.fc_norm.eps = 1e-6
    theirs.load_state_dict(rename_to_videomae(ours.state_dict(), theirs.state_dict()))
    video = read_video(info, data)
    with torch.no_grad():
        torch.testing.assert_close(theirs(video).logits, ours(video).logits, atol=1e-5, rtol=0)


def rename_to_videomae(state: dict, target: dict) -> dict:
    """Our names to VideoMAE's; its query and value biases have other names before Transformers 5.23."""
    renames = (
        ("vision_model.", "videomae."),
        (".layers.", ".encoder.layer."),
        ("attention.q_proj.", "attention.attention.query."),
        ("attention.k_proj.", "attention.attention.key."),
        ("attention.v_proj.", "attention.attention.value."),
        ("attention.o_proj.", "attention.output.dense."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
    )
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if name not in target:
            name = name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
        renamed[name] = tensor.view(target[name].shape)
    return renamed


REAL_SIZES = {
    "pretrain_umt_base_patch16_224": "umt-vit-b16",
    "pretrain_umt_large_patch16_224": "umt-vit-l16",
    "vit_base_patch16_224_16f_k400": "umt-vit-b16-k400-f16",
    "vit_base_patch16_224_8f_k400": "umt-vit-b16-k400",
    "vit_base_patch16_224_8f_k710": "umt-vit-b16-k710",
    "vit_base_patch16_224_8f_ssv2": "umt-vit-b16-ssv2",
    "vit_base_patch16_384_8f_mit339": "umt-vit-b16-mit-384",
    "vit_large_patch16_224_16f_k400": "umt-vit-l16-k400-f16",
    "vit_large_patch16_224_8f_k400": "umt-vit-l16-k400",
    "vit_large_patch16_384_8f_mit339": "umt-vit-l16-mit-384",
}


@pytest.mark.parametrize("table,name", REAL_SIZES.items())
def test_names_and_shapes_of_real_sizes(table, name):
    """Every released single-modality recipe, on the meta device: each tensor finds its place and none is missing."""
    from umt_hf.hub_cards.convert_umt_checkpoint import ConversionReport, build_published_config

    info = load_table(f"names_{table}")
    config, task = build_published_config(name)
    source = {key: torch.empty(shape, device="meta") for key, shape in info["state_dict"].items()}
    assert len(source) == info["tensors_in_state_dict"]
    report = ConversionReport()
    converted = convert_state_dict(source, config, task, report)
    assert report.used.keys() | report.set_aside.keys() == source.keys()
    assert set(report.set_aside) <= {"pos_embed"}
    count = sum(tensor.numel() for tensor in converted.values())
    stored = sum(source[key].numel() for key in report.set_aside)
    assert count + stored == info["parameters_total"]
