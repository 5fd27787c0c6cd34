"""Smaller parts of the published stage 2: the teacher from a 2-D checkpoint, position tables, and edge cases."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.parity.multi_modality import assert_equal, load_case, load_table, read_video
from umt_hf import UMTVideoTextConfig, UMTVideoTextForPreTraining, UMTVideoTextForQuestionAnswering
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.masking_umt_video import build_mask
from umt_hf.modeling.modeling_umt_video import UMTVideoModel
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import TokenGrid, count_visible, draw_visible_indices

BEHAVIOURS = load_table("behaviours")["entries"]
MASK_RATIOS = {"video": 0.7, "image": 0.5}


def rename_teacher_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Published names of a CLIP image tower to those of Transformers' own."""
    prefix = "vision_model."
    outside = {
        "class_embedding": f"{prefix}embeddings.class_embedding",
        "positional_embedding": f"{prefix}embeddings.position_embedding.weight",
        "conv1.weight": f"{prefix}embeddings.patch_embedding.weight",
    }
    if name == "proj":
        return {"visual_projection.weight": tensor.T}
    if name in outside:
        return {outside[name]: tensor}
    for old, new in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        if name.startswith(old):
            return {prefix + name.replace(old, new): tensor}
    _, _, layer, rest = name.split(".", 3)
    stem = f"{prefix}encoder.layers.{layer}."
    if "in_proj" in rest:
        kind = rest.rsplit("_", 1)[1]
        return {f"{stem}self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", tensor.chunk(3), strict=True)}
    for old, new in (
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ):
        rest = rest.replace(old, new)
    return {stem + rest: tensor}


def test_teacher_from_a_2d_checkpoint_of_another_grid():
    info, data = load_case("clip_teacher")
    config = CLIPVisionConfig(
        image_size=info["source_grid"] * 14,
        patch_size=14,
        hidden_size=info["width"],
        num_hidden_layers=info["layers"],
        num_attention_heads=info["heads"],
        intermediate_size=4 * info["width"],
        projection_dim=info["output_dim"],
    )
    tower = CLIPVisionModelWithProjection(config).eval()
    source = {name.removeprefix("src/"): t for name, t in data["inputs"].items() if name.startswith("src/")}
    renamed = {}
    for name, tensor in source.items():
        renamed |= rename_teacher_tensor(name, tensor)
    tower.load_state_dict(renamed, strict=True)
    teacher = UMTTeacher(
        tower, info["return_layer"], info["return_interval"], info["input_resolution"], alignment_norm="none"
    )
    resized = teacher.vision_tower.vision_model.embeddings.position_embedding.weight
    assert_equal(resized, data["outputs"]["positional_embedding"], "position table")
    outputs = teacher(read_video(data["inputs"]["video_u8"]).transpose(1, 2))
    assert_equal(outputs.features, data["outputs"]["features"], "features")
    assert_equal(outputs.saliency, data["outputs"]["attn"], "saliency")


POSITION_TABLES = list(load_table("pos_tables")["tensors"])


@pytest.mark.parametrize("name", [name.removeprefix("outputs/") for name in POSITION_TABLES])
def test_position_tables(name):
    info, data = load_case("pos_tables")
    num_frames, stored = 1, None
    if name != "image_table":
        num_frames, stored = (int(part[1:]) if part[0] == "T" else int(part[4:]) for part in name.split("_")[1:])
        stored = None if stored == -1 else stored
    config = UMTVideoConfig(
        image_size=64,
        hidden_size=info["dim"],
        num_hidden_layers=1,
        num_attention_heads=4,
        num_frames=num_frames,
        num_aligned_layers=1,
        position_embedding_frames=stored,
        position_embedding_image_size=None if stored is None else 64,
    )
    table = UMTVideoModel(config).embeddings.compute_position_embeddings((num_frames, 4, 4))
    assert_equal(table, data["outputs"][name], name)


def build_tiny(**fields) -> UMTVideoTextForPreTraining:
    torch.manual_seed(0)
    vision = {"image_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "fusion_layer": 1}
    config = UMTVideoTextConfig(
        vision_config={**vision, "intermediate_size": 64, "num_aligned_layers": 2, "teacher_hidden_size": 32},
        text_config={**text, "intermediate_size": 64, "encoder_width": 48, "mask_token_id": 3, "bos_token_id": 1},
        projection_dim=16,
        **fields,
    )
    return UMTVideoTextForPreTraining(config).eval()


@pytest.mark.parametrize("media,num_frames", [("video", 4), ("image", 1)])
@pytest.mark.parametrize("mask_type", ["attention", "tube", "random"])
def test_visible_tokens_and_pooled_vectors(mask_type, media, num_frames):
    """As published with attention masks: one vector a clip when masked; a tube mask pools the same way here."""
    expected = BEHAVIOURS[f"shapes_mask_{mask_type}_keeptemporal0"]["value"][media]
    grid, ratio = TokenGrid(num_frames, 16), MASK_RATIOS[media]
    noise = torch.empty(2, grid.num_tokens).exponential_()
    visible = draw_visible_indices(mask_type, ratio, torch.rand(2 * num_frames, 16), noise, grid)
    mask = build_mask(visible, grid.num_tokens)
    assert (~mask).sum(1).tolist() == [count_visible(mask_type, ratio, grid)] * 2 == [expected["vision_embeds"][1]] * 2
    model = build_tiny()
    outputs = model.get_video_features(torch.randn(2, num_frames, 3, 64, 64), bool_masked_pos=mask)
    assert list(outputs.last_hidden_state.shape) == expected["vision_embeds"]
    assert expected["pooled"][1] == 1 and outputs.pooler_output.shape == (2, 16) and outputs.frame_embeds is None


def test_unmasked_videos_pool_per_frame():
    expected = BEHAVIOURS["test_time_shapes"]["value"]
    outputs = build_tiny().get_video_features(torch.randn(2, 4, 3, 64, 64))
    assert list(outputs.last_hidden_state.shape) == expected["vision_embeds"]
    assert outputs.frame_embeds.shape == (2, expected["pooled_keep_temporal_true"][1], 16)
    assert outputs.pooler_output.shape == (2, 16)


@pytest.mark.parametrize("case,pair_ids", [("pretrain_batch_of_one", [5]), ("pretrain_all_ids_equal", [5, 5])])
def test_batches_without_negatives_do_not_raise_here(case, pair_ids):
    assert BEHAVIOURS[case]["raises"] == "RuntimeError"
    model, size = build_tiny(), len(pair_ids)
    ids = torch.tensor([[1, 7, 8]] * size)
    outputs = model(ids, None, torch.randn(size, 2, 3, 64, 64), pair_ids=torch.tensor(pair_ids), return_loss=True)
    assert outputs.vtm_loss == 0 and outputs.loss.isfinite()


def test_language_loss_without_chosen_tokens_is_0_instead_of_nan():
    assert BEHAVIOURS["mlm_nothing_selected_loss"]["value"] == "nan"
    model, ids = build_tiny(), torch.tensor([[1, 7, 8], [1, 9, 8]])
    nothing = torch.full_like(ids, -100)
    videos = torch.randn(2, 2, 3, 64, 64)
    outputs = model(ids, None, videos, return_loss=True, mlm_input_ids=ids, mlm_labels=nothing)
    assert outputs.mlm_loss == 0


def test_question_answering_is_called_as_it_was_meant():
    """The published call has one argument too many; other frame counts and images work here, unlike there."""
    assert BEHAVIOURS["qa_published_call"]["raises"] == "TypeError"
    assert BEHAVIOURS["vision_wrong_frame_count"]["raises"] == "RuntimeError"
    model = UMTVideoTextForQuestionAnswering(build_tiny().config).eval()
    question = torch.tensor([[1, 7, 8]])
    for num_frames in (1, 3):
        states = model(torch.randn(1, num_frames, 3, 64, 64), question).last_hidden_state
        assert states.shape == (1, 3, 48)
    answers = torch.tensor([[1, 5, 2], [1, 6, 2]])
    with pytest.raises(ValueError, match="top_k=3"):
        model.rank_answers(torch.randn(1, 2, 3, 64, 64), question, None, answers, torch.ones_like(answers), top_k=3)
