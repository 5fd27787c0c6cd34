"""Stage 2 and retrieval training as a whole, and the encoder at their heart, against the published implementation."""

import pytest
import torch

from tests.parity import reference
from tests.parity.multi_modality import assert_equal, build_config, build_model, check_gradients, load_case, read_video
from tests.parity.test_teacher_parity import build_teacher
from umt_hf.hub_cards.convert_umt_checkpoint import _convert_tensor
from umt_hf.modeling.losses_umt import (
    compute_negative_weights,
    compute_similarity,
    find_true_pairs,
    mlm_loss,
    normalize_features,
    vtc_loss,
    vtm_loss,
)
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForPreTraining

LOSSES = ("uta", "vtc", "vtm", "mlm")


def read_inputs(data: dict, draws: str = "") -> dict[str, torch.Tensor]:
    """Inputs of our forward: the tensors, the recorded mask and the recorded draws."""
    inputs, outputs = data["inputs"], data["outputs"]
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": read_video(inputs["image_u8"]),
        "pair_ids": inputs["idx"],
        "video_negatives": inputs[f"{draws}rand/vision_neg"],
        "text_negatives": inputs[f"{draws}rand/text_neg"],
        "mlm_input_ids": outputs[f"{draws}mlm_input_ids"],
        "mlm_labels": outputs[f"{draws}mlm_labels"],
        "bool_masked_pos": outputs[f"{draws}teacher_mask"],
        "return_loss": True,
    }


def check_negative_weights(outputs, data: dict, draws: str = "") -> None:
    logits = outputs.logits_per_video
    is_pair = find_true_pairs(len(logits), data["inputs"]["idx"], "cpu")
    videos, texts = compute_negative_weights(logits, is_pair)
    torch.testing.assert_close(videos, data["outputs"][f"{draws}vtm_weights_t2v"], atol=2e-5, rtol=0)
    torch.testing.assert_close(texts, data["outputs"][f"{draws}vtm_weights_v2t"], atol=2e-5, rtol=0)
    assert not videos[is_pair].any() and not texts[is_pair].any()


def check_video_vectors(model, outputs, published: dict[str, torch.Tensor]) -> None:
    """The published projections, and the mean of their unit vectors, which is what a video's vector is."""
    projected, video = published["vision_proj"], outputs.vision_model_output
    assert_equal(model.project_video(video.last_hidden_state, projected.shape[1]), projected, "vision_proj")
    assert_equal(video.pooler_output, normalize_features(projected).mean(dim=1), "pooler_output")
    assert torch.equal(outputs.video_embeds, video.pooler_output)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["umt_pretrain_video", "umt_pretrain_image"])
def test_pretraining_losses_and_gradients(name, attention):
    info, data = load_case(name)
    model = build_model(info, data["weights"], "video_text_pretraining")
    model.set_attn_implementation(attention)
    published = data["outputs"]
    outputs = model(**read_inputs(data), teacher_features=published["teacher_features"])

    assert_equal(outputs.vision_model_output.last_hidden_state, published["vision_embeds"], "vision_embeds")
    check_video_vectors(model, outputs, published)
    assert_equal(outputs.text_model_output.last_hidden_state, published["text_embeds"], "text_embeds")
    assert_equal(outputs.text_model_output.pooler_output, published["text_proj"], "text_proj")
    assert_equal(outputs.logits_per_video, published["sim_v2t"], "sim_v2t")
    assert_equal(outputs.aligned_features, normalize_features(published["student_output"]), "student_output")
    assert_equal(outputs.matching_logits, published["vtm_logits"], "vtm_logits")
    assert_equal(outputs.mlm_logits, published["mlm_logits"], "mlm_logits")
    check_negative_weights(outputs, data)
    for loss in LOSSES:
        assert outputs[f"{loss}_loss"].item() == pytest.approx(published[f"loss_{loss}"].item(), rel=2e-5), loss
    assert outputs.loss.item() == pytest.approx(published["total"].item(), rel=2e-5)
    assert model.temperature.item() == published["temp_after"].item()

    outputs.loss.backward()
    check_gradients(model, info, data, "pretrain")


@pytest.mark.parametrize("name", ["umt_pretrain_video", "umt_pretrain_image"])
def test_teacher_features_and_attention(name):
    info, data = load_case(name)
    names = reference.load_case("teacher_p14_posresize")[0]["hf_clip_vision_model_with_projection"]
    weights = {
        key.removeprefix("clip_teacher."): tensor
        for key, tensor in data["weights"].items()
        if key.startswith("clip_teacher.")
    }
    arguments = info["config"]["clip_teacher"]
    teacher = build_teacher(arguments, weights, names, arguments["input_resolution"])
    outputs = teacher(read_video(data["inputs"]["image_u8"]))
    published = data["outputs"]
    assert_equal(outputs.features, normalize_features(published["teacher_features"]), "features", scale=2)
    assert_equal(outputs.saliency, published["teacher_attn"], "attention", scale=2)


def test_tube_masks_with_one_vector_a_frame():
    """The published code pools per frame under tube masks; ours pools once a clip, but from the same parts."""
    info, data = load_case("umt_pretrain_video")
    model = build_model(info, data["weights"], "video_text_pretraining")
    published = {key.removeprefix("tube/"): t for key, t in data["outputs"].items() if key.startswith("tube/")}
    with torch.no_grad():
        outputs = model(**read_inputs(data, "tube/"), teacher_features=data["outputs"]["teacher_features"])
        assert outputs.video_embeds.shape == (len(outputs.text_embeds), outputs.text_embeds.shape[1])
        assert outputs.vision_model_output.frame_embeds is None
        assert outputs.uta_loss.item() == pytest.approx(published["loss_uta"].item(), rel=2e-5)
        assert outputs.vtm_loss.item() == pytest.approx(published["loss_vtm"].item(), rel=2e-5)
        assert outputs.mlm_loss.item() == pytest.approx(published["loss_mlm"].item(), rel=2e-5)
        assert_equal(outputs.matching_logits, published["vtm_logits"])

        frames = model.project_video(outputs.vision_model_output.last_hidden_state, 4)
        assert_equal(frames, published["vision_proj"])
        texts = outputs.text_model_output.pooler_output
        assert_equal(compute_similarity(frames, texts) / model.temperature, published["sim_v2t"])
        loss = vtc_loss(frames, texts, model.temperature, data["inputs"]["idx"])
        assert loss.item() == pytest.approx(published["loss_vtc"].item(), rel=2e-5)
    total = sum(published[f"loss_{name}"].item() for name in LOSSES)
    assert total == pytest.approx(published["total"].item(), rel=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_retrieval_losses_and_gradients(attention):
    info, data = load_case("umt_retrieval_train")
    model = build_model(info, data["weights"], "retrieval")
    model.set_attn_implementation(attention)
    published, inputs = data["outputs"], data["inputs"]
    outputs = model(
        inputs["input_ids"],
        inputs["attention_mask"],
        read_video(inputs["image_u8"]),
        pair_ids=inputs["idx"],
        video_negatives=inputs["rand/vision_neg"],
        text_negatives=inputs["rand/text_neg"],
        return_loss=True,
    )
    assert_equal(outputs.vision_model_output.last_hidden_state, published["vision_embeds"], "vision_embeds")
    check_video_vectors(model, outputs, published)
    assert_equal(outputs.text_model_output.last_hidden_state, published["text_embeds"], "text_embeds")
    assert_equal(outputs.text_model_output.pooler_output, published["text_proj"], "text_proj")
    assert_equal(outputs.logits_per_video, published["sim_v2t"], "sim_v2t")
    assert_equal(outputs.matching_logits, published["vtm_logits"], "vtm_logits")
    check_negative_weights(outputs, data)
    assert outputs.vtc_loss.item() == pytest.approx(published["loss_vtc"].item(), rel=2e-5)
    assert outputs.vtm_loss.item() == pytest.approx(published["loss_vtm"].item(), rel=2e-5)
    assert outputs.loss.item() == pytest.approx(published["total"].item(), rel=2e-5)
    outputs.loss.backward()
    check_gradients(model, info, data, "retrieval")


@pytest.fixture(scope="module")
def vision_case():
    """The published encoder alone, in a model whose other parts do not matter."""
    info, data = load_case("vision_encoder")
    weights = {}
    for name, tensor in data["weights"].items():
        if name.startswith("pool_norm."):
            weights["video_norm." + name.removeprefix("pool_norm.")] = tensor
        else:
            weights.update(_convert_tensor(name.removeprefix("encoder."), tensor))
    model = UMTVideoTextForPreTraining(build_config(info)).eval()
    loading = model.load_state_dict(weights, strict=False)
    assert not loading.unexpected_keys
    assert not any(name.startswith(("vision_model.", "video_norm.", "alignment")) for name in loading.missing_keys)
    return data, model


@pytest.mark.parametrize(
    "call,mask,num_vectors",
    [
        ("video_nomask_keeptemporal0", None, 1),
        ("video_nomask_keeptemporal1", None, 4),
        ("video_framemask_keeptemporal0", "mask_video_per_frame", 1),
        ("video_framemask_keeptemporal1", "mask_video_per_frame", 4),
        ("video_framemask_returnlayer0", "mask_video_per_frame", 1),
        ("video_randommask_keeptemporal0", "mask_video_random", 1),
        ("image_nomask_keeptemporal0", None, 1),
        ("image_nomask_keeptemporal1", None, 1),
        ("image_mask_keeptemporal0", "mask_image", 1),
    ],
)
def test_encoder(vision_case, call, mask, num_vectors):
    data, model = vision_case
    inputs, published = data["inputs"], data["outputs"]
    video = read_video(inputs["image_u8" if call.startswith("image") else "video_u8"]).transpose(1, 2)
    mask = None if mask is None else inputs[mask].bool()
    with torch.no_grad():
        outputs = model.vision_model(video, mask, output_aligned_states=True)
        pooled = model.video_norm(outputs.last_hidden_state.unflatten(1, (num_vectors, -1)).mean(2))
    if f"{call}/x_vis" in published:
        assert_equal(outputs.last_hidden_state, published[f"{call}/x_vis"])
    assert_equal(pooled, published[f"{call}/x_pool_vis"])
    if f"{call}/x_clip" in published:
        outputs = model(
            torch.ones(len(video), 2, dtype=torch.long),
            pixel_values=video,
            bool_masked_pos=mask,
            teacher_features=published[f"{call}/x_clip"],
            return_loss=True,
        )
        assert_equal(outputs.aligned_features, normalize_features(published[f"{call}/x_clip"]))
        assert abs(outputs.uta_loss.item()) < 1e-5


@pytest.mark.parametrize("num_frames", [8, 12])
def test_more_frames_get_a_table_of_their_own(vision_case, num_frames):
    """As published without `ckpt_num_frame`, which no published configuration sets."""
    data, model = vision_case
    video = read_video(data["inputs"]["video_u8"]).transpose(1, 2)
    video = video.repeat(1, num_frames // 4, 1, 1, 1)
    video = video * torch.linspace(0.5, 1.5, num_frames)[:, None, None, None]
    with torch.no_grad():
        tokens = model.vision_model(video).last_hidden_state
        pooled = model.video_norm(tokens.unflatten(1, (num_frames, -1)).mean(2))
    assert_equal(pooled, data["outputs"][f"frames{num_frames}_plain/x_pool_vis"])


def test_position_tables(vision_case):
    data, model = vision_case
    embeddings = model.vision_model.embeddings
    for name, grid in (("pos_embed", (4, 4, 4)), ("img_pos_embed", (1, 4, 4))):
        for prefix in ("", "clip_"):
            table = data["outputs"][prefix + name]
            torch.testing.assert_close(embeddings.compute_position_embeddings(grid), table, atol=1e-6, rtol=0)


def test_parts_add_up_to_the_published_pretraining_loss():
    """The pure functions on published tensors, without our towers."""
    _, data = load_case("umt_pretrain_image")
    published = data["outputs"]
    assert vtm_loss(published["vtm_logits"]).item() == pytest.approx(published["loss_vtm"].item(), rel=1e-6)
    loss = mlm_loss(published["mlm_logits"], published["mlm_labels"])
    assert loss.item() == pytest.approx(published["loss_mlm"].item(), rel=1e-6)
