"""The converter's strictness, its files on disk, and what it says when something does not fit."""

import argparse

import pytest
import torch

from tests.parity.reference import load_case, load_table
from tests.parity.test_student_parity import build_config
from umt_hf.hub_cards.convert_umt_checkpoint import build_published_config, convert_checkpoint, convert_state_dict
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining, UMTVideoForVideoClassification, UMTVideoModel

CASE = "student_k2_layerscale"


def test_checkpoint_folder_gives_published_outputs(tmp_path):
    info, data = load_case(CASE)
    torch.save({"model": data["weights"], "args": argparse.Namespace(lr=1)}, tmp_path / "source.pth")
    config = build_config(info["constructor"])
    report = convert_checkpoint(tmp_path / "source.pth", config, "pretraining", tmp_path / "model")
    assert report.used.keys() == data["weights"].keys() and not report.set_aside
    assert (tmp_path / "model" / "model.safetensors").is_file()
    model, loading = UMTVideoForPreTraining.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    outputs = model(data["inputs"]["video"].transpose(1, 2), data["inputs"]["mask"].bool())
    torch.testing.assert_close(outputs.aligned_features, data["outputs"]["student"], atol=5e-6, rtol=0)


def test_pickles_with_code_are_refused(tmp_path):
    from fractions import Fraction

    torch.save({"model": {}, "epoch": Fraction(1, 2)}, tmp_path / "source.pth")
    with pytest.raises(ValueError, match=r"source\.pth cannot be read as tensors alone"):
        convert_checkpoint(tmp_path / "source.pth", "umt-vit-b16", None, tmp_path / "model")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.pop("encoder.norm.weight"), "missing vision_model.norm.weight"),
        (lambda w: w.update({"encoder.surprise": torch.zeros(1)}), "no place for encoder.surprise"),
        (lambda w: w.update({"clip_decoder.7.head.bias": torch.zeros(1)}), "no place for alignment_heads.7"),
        (lambda w: w.update({"encoder.norm.bias": torch.zeros(3)}), r"vision_model.norm.bias is \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    info, data = load_case(CASE)
    weights = dict(data["weights"])
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(weights, build_config(info["constructor"]), "pretraining")


def name_internvideo2(width: int, heads_of_alignment: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer, pooling and alignment as PretrainInternVideo2 of the published code names them."""
    layer = {
        "norm1.weight": (width,), "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,), "attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,),
        "ls1.gamma": (width,), "norm2.weight": (width,), "mlp.fc1.weight": (48, width), "mlp.fc1.bias": (48,),
        "mlp.fc2.weight": (width, 48), "mlp.fc2.bias": (width,), "ls2.gamma": (width,),
    }  # fmt: skip
    shapes = {f"blocks.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 1, 14, 14)}
    shapes |= {"patch_embed.proj.bias": (width,), "clip_projector.cross_attn.q.weight": (width, width)}
    shapes |= {f"clip_decoder.{index}.head.weight": (12, width) for index in range(heads_of_alignment)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_a_checkpoint_of_internvideo2_is_refused_by_name():
    """What docs/from_internvideo2.md says: its layers are others, so nothing of it is taken."""
    config = UMTVideoConfig(
        image_size=28, patch_size=14, position_embedding_image_size=28, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=48, num_aligned_layers=1, teacher_hidden_size=12,
    )  # fmt: skip
    weights = name_internvideo2(32, 1)
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert_state_dict(weights, config, "pretraining")
    for name in ("blocks.0.attn.q_norm.weight", "clip_projector.cross_attn.q.weight", "cls_token"):
        assert f"no place for {name}" in str(caught.value)
    assert "missing vision_model.layers.0.attention.q_proj.bias" in str(caught.value)
    with_table = weights | {"pos_embed": torch.zeros(1, 8 * 4 + 1, 32)}  # with a place for the class token
    with pytest.raises(ValueError, match="pos_embed has 33 rows, but 8 frames of 28 pixels make 32"):
        convert_state_dict(with_table, config, "pretraining")


def test_learnable_table_is_kept():
    info, data = load_case(CASE)
    config = build_config(info["constructor"])
    config.learnable_position_embedding = True
    num_positions = int(torch.tensor(config.position_embedding_grid).prod())
    table = torch.randn(1, num_positions, config.hidden_size)
    converted = convert_state_dict({**data["weights"], "encoder.pos_embed": table}, config, "pretraining")
    assert torch.equal(converted["vision_model.embeddings.position_embeddings"], table)


def test_unknown_name_and_task():
    with pytest.raises(ValueError, match="umt-vit-b16"):
        build_published_config("umt-vit-huge")
    with pytest.raises(ValueError, match="pretraining"):
        convert_state_dict({}, build_published_config("umt-vit-b16")[0], "segmentation")


def test_handover_to_classifier_uses_what_the_published_script_uses(tmp_path):
    """Stage-1 folder -> classifier: encoder kept, token norm and alignment heads dropped, new head and norm."""
    published = load_table("checkpoint_transfer")["hand_overs"][0]
    info, data = load_case(CASE)
    config = build_config(info["constructor"])
    student = UMTVideoForPreTraining(config)
    student.load_state_dict(convert_state_dict(data["weights"], config, "pretraining"))
    student.save_pretrained(tmp_path)
    model, loading = UMTVideoForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    fresh = {name.replace("classifier.", "head.") for name in loading["missing_keys"]}
    assert fresh == set(published["model_names_left_at_initial_value"])
    assert not loading["unexpected_keys"]
    assert not model.config.use_final_norm
    assert torch.equal(model.fc_norm.weight, torch.ones_like(model.fc_norm.weight))
    assert model.classifier.weight.std() < 1e-4
    for name, tensor in student.vision_model.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(model.vision_model.state_dict()[name], tensor), name

    model.save_pretrained(tmp_path / "classifier")
    encoder, loading = UMTVideoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not loading["missing_keys"]
    for name, tensor in model.vision_model.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
