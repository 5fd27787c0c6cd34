"""Conversion of released video-text checkpoints: every real size by name and shape, and a tiny one with its values."""

import pytest
import torch

from tests.parity.multi_modality import build_config, load_case, load_table, read_video
from umt_hf.hub_cards.convert_umt_checkpoint import (
    TASK_CLASSES,
    ConversionReport,
    _convert_video_text_tensor,
    build_published_config,
    convert_checkpoint,
    convert_state_dict,
)
from umt_hf.modeling.losses_umt import normalize_features
from umt_hf.modeling.modeling_umt_video import UMTVideoModel
from umt_hf.modeling.modeling_umt_video_text import (
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
)

REAL_SIZES = {
    "umt-vit-b16-5m": "pretrain_b16_5m",
    "umt-vit-b16-25m": "pretrain_b16_25m",
    "umt-vit-l16-25m": "pretrain_l16_25m",
    "umt-vit-b16-25m-msrvtt": "retrieval_b16",
    "umt-vit-l16-25m-ssv2-label": "retrieval_l16",
    "umt-vit-b16-25m-anet-qa": "qa_b16",
    "umt-vit-l16-25m-msvd-qa": "qa_l16",
}
REASONS = {"clip_teacher.": "teacher", "position_ids": "counts itself", "cls.predictions.decoder.bias": "repeats"}


@pytest.mark.parametrize("name,table", REAL_SIZES.items())
def test_names_and_shapes_of_real_sizes(name, table):
    """On the meta device: each tensor finds its place or is named with a reason, and none is missing."""
    info = load_table(f"shapes/{table}")
    config, task = build_published_config(name)
    source = {key: torch.empty(shape, device="meta") for key, shape in info["state_dict"].items()}
    assert len(source) == info["n_state_dict_entries"]
    report = ConversionReport()
    converted = convert_state_dict(source, config, task, report)
    assert report.used.keys() | report.set_aside.keys() == source.keys()
    for key, reason in report.set_aside.items():
        assert any(part in key and word in reason for part, word in REASONS.items()), (key, reason)
    teacher = sum(tensor.numel() for key, tensor in source.items() if key.startswith("clip_teacher."))
    assert teacher == info["parameter_count"]["by_module"].get("clip_teacher", 0)

    with torch.device("meta"):
        model = TASK_CLASSES[task](config)
    assert converted.keys() == model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == info["parameter_count"]["without_clip_teacher"]
    vision = info["hyper"]["vision"]
    assert config.vision_config.num_frames == vision["num_frames"]
    assert config.text_config.fusion_layer == info["hyper"]["text"]["fusion_layer"]
    if task == "video_text_pretraining":
        assert config.vision_config.teacher_image_size == vision["clip_img_size"]


def test_released_layout_with_teacher_is_taken_for_fine_tuned_models_too():
    """The authors save the teacher along with every model."""
    source = {key: torch.empty(shape) for key, shape in {"clip_teacher.proj": (2, 2)}.items()}
    config, task = build_published_config("umt-vit-b16-25m-msrvtt")
    report = ConversionReport()
    with pytest.raises(ValueError, match="missing"):
        convert_state_dict(source, config, task, report)
    assert "openai/clip-vit-base-patch16" in report.set_aside["clip_teacher.proj"]


def test_checkpoint_folder_serves_every_use(tmp_path):
    info, data = load_case("umt_pretrain_video")
    torch.save({"model": data["weights"], "epoch": torch.tensor(9)}, tmp_path / "source.pth")
    config = build_config(info)
    report = convert_checkpoint(tmp_path / "source.pth", config, "video_text_pretraining", tmp_path / "model")
    assert report.used.keys() | report.set_aside.keys() == data["weights"].keys()
    assert sum(key.startswith("clip_teacher.") for key in report.set_aside) == len(report.set_aside) - 2

    video, mask = read_video(data["inputs"]["image_u8"]), data["outputs"]["teacher_mask"]
    encoder, loading = UMTVideoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"]
    with torch.no_grad():
        tokens = encoder.eval()(video, mask).last_hidden_state
    torch.testing.assert_close(tokens, data["outputs"]["vision_embeds"], atol=1e-5, rtol=1e-5)
    for cls in (UMTVideoTextForPreTraining, UMTVideoTextForRetrieval):
        model, loading = cls.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        features, projected = model.get_video_features(video, mask), data["outputs"]["vision_proj"]
        vectors = model.project_video(features.last_hidden_state, projected.shape[1])
        torch.testing.assert_close(vectors, projected, atol=1e-5, rtol=1e-5)
        pooled = normalize_features(projected).mean(dim=1)
        torch.testing.assert_close(features.pooler_output, pooled, atol=1e-5, rtol=1e-5)


def rename(published: str) -> list[str]:
    """Our names of a published parameter; none for the numbers of the tokens, which are no parameter any more."""
    if published.endswith("position_ids"):
        return []
    return list(_convert_video_text_tensor(published, torch.empty(1) if published == "temp" else torch.empty(3, 1)))


@pytest.mark.parametrize(
    "rule,load",
    [
        ("stage2_to_retrieval", UMTVideoTextForRetrieval.from_pretrained),
        ("stage2_to_qa", UMTVideoTextForQuestionAnswering.from_pretraining),
    ],
)
def test_stage_2_is_handed_over_as_published(rule, load, tmp_path):
    """Every weight of the fine-tuned model comes from the one that the published scripts load it from."""
    info = load_table("video_qa")
    source = UMTVideoTextForPreTraining(build_config(info))
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    source.save_pretrained(tmp_path)
    loaded, state = load(tmp_path).state_dict(), source.state_dict()
    seen = set()
    for target, origin in load_table("loading_rules")[rule]["target_loaded_from"].items():
        for ours, theirs in zip(rename(target), rename(origin), strict=True):
            assert torch.equal(loaded[ours], state[theirs]), (target, origin)
            seen.add(ours)
    assert seen == loaded.keys()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.pop("vision_encoder.pool_norm.weight"), "missing video_norm.weight"),
        (lambda w: w.update({"vision_encoder.surprise": torch.zeros(1)}), "no place for vision_encoder.surprise"),
        (lambda w: w.update({"text_encoder.bert.pooler.x": torch.zeros(1)}), "no place for text_model.pooler.x"),
        (lambda w: w.update({"text_encoder.bert.surprise": torch.zeros(1)}), "no place for text_model.surprise"),
        (lambda w: w.update({"vision_proj.bias": torch.zeros(3)}), r"video_projection.bias is \(3,\)"),
        (lambda w: w.update({"text_encoder.cls.predictions.decoder.bias": torch.zeros(120)}), "are one tensor"),
        (lambda w: w.update({"text_encoder.cls.predictions.decoder.weight": torch.zeros(120, 64)}), "are one tensor"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    info, data = load_case("umt_pretrain_video")
    weights = dict(data["weights"])
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(weights, build_config(info), "video_text_pretraining")


def test_unknown_names():
    for name in ("umt-vit-b16-25m-k400", "umt-vit-b16-25m-lsmdc-qa", "umt-vit-b16-9m"):
        with pytest.raises(ValueError, match=name):
            build_published_config(name)
