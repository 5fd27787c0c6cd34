"""Behaviour of the video-text models that no reference number covers."""

import copy
import logging

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    BertConfig,
    BertForPreTraining,
    BertModel,
    GenerationConfig,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import logging as transformers_logging

import umt_hf
from tests.parity.multi_modality import load_table
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.configuration_umt_video_text import UMTTextConfig, UMTVideoTextConfig, build_decoder_config
from umt_hf.modeling.masking_umt_video import compute_visible_indices, sample_random_mask
from umt_hf.modeling.modeling_umt_text import UMTTextLMHeadModel, UMTTextModel
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining, UMTVideoModel
from umt_hf.modeling.modeling_umt_video_text import (
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

TINY_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 2,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 12,
}
TINY_TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "fusion_layer": 2,
    "encoder_width": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TINY = {"vision_config": TINY_VISION, "text_config": TINY_TEXT, "projection_dim": 16}
CLASSES = (UMTVideoTextModel, UMTVideoTextForRetrieval, UMTVideoTextForPreTraining, UMTVideoTextForQuestionAnswering)


def build_batch(batch_size: int = 4) -> dict[str, torch.Tensor]:
    """Videos of two frames, three quarters masked, with texts of different lengths and a teacher's features."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(104, 120, (batch_size, 7), generator=generator)
    attention_mask = (torch.arange(7) < torch.arange(4, 4 + batch_size)[:, None].clamp(max=7)).long()
    input_ids[:, 0] = 101
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch_size, 2, 3, 32, 32, generator=generator),
        "bool_masked_pos": sample_random_mask(batch_size, 32, 0.75, generator),
        "teacher_features": torch.randn(2, batch_size, 32, 12, generator=generator),
    }


def build_draws(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Draws that never leave a pair of neighbours, and unequal numbers of words to predict."""
    labels = batch["input_ids"].clone()
    labels[:, 0] = -100
    labels[0] = -100
    labels[batch["attention_mask"] == 0] = -100
    negatives = torch.arange(len(labels)).view(-1, 2).flip(1).flatten()
    return {
        "video_negatives": negatives,
        "text_negatives": negatives.clone(),
        "mlm_input_ids": torch.where(labels != -100, 103, batch["input_ids"]),
        "mlm_labels": labels,
    }


def pad_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = mask.sum(1)
    return (
        torch.stack([row.roll(len(row) - int(n)) for row, n in zip(ids, lengths, strict=True)]),
        torch.stack([row.roll(len(row) - int(n)) for row, n in zip(mask, lengths, strict=True)]),
    )


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return build_batch()


@pytest.fixture
def inputs(batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture
def config() -> UMTVideoTextConfig:
    return UMTVideoTextConfig(**TINY)


@pytest.fixture
def question_answering(config) -> UMTVideoTextForQuestionAnswering:
    torch.manual_seed(0)
    model = UMTVideoTextForQuestionAnswering(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # far from the start, where all answers are alike
    return model


def test_auto_classes_know_the_family(tmp_path, config):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UMTVideoTextConfig
    for name in ("vision_config", "text_config"):
        assert getattr(loaded, name).to_dict() == getattr(config, name).to_dict()
    assert type(AutoModel.from_config(loaded)) is UMTVideoTextModel
    assert type(AutoModelForPreTraining.from_config(loaded)) is UMTVideoTextForPreTraining
    assert type(AutoModelForVisualQuestionAnswering.from_config(loaded)) is UMTVideoTextForQuestionAnswering
    assert type(AutoModel.from_config(loaded.text_config)) is UMTTextModel
    assert all(name in dir(umt_hf) for name in umt_hf.__all__ if name != "UMTTeacher")


def test_vision_defaults_are_those_of_stage_2(config):
    assert config.vision_config.position_embedding_frames is None
    assert config.vision_config.alignment_norm_eps == 1e-5
    assert UMTVideoTextConfig(vision_config=UMTVideoConfig()).vision_config.position_embedding_frames == 8
    assert config.text_config.cls_token_id == 101 and config.text_config.sep_token_id == 102


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"text_config": {"encoder_width": 64}}, "encoder_width=64"),
        ({"text_config": {"fusion_layer": 13}}, "fusion_layer=13"),
        ({"text_config": {"is_decoder": True}}, "is_decoder"),
        ({"text_config": {"num_attention_heads": 7}}, "num_attention_heads=7"),
        ({"temperature_init_value": 0.9}, "temperature_bounds"),
        ({"mlm_probability": 1.0}, "mlm_probability"),
        ({"contrastive_gather": "local"}, "contrastive_gather"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(Exception, match=message):
        UMTVideoTextConfig(**fields)


def test_attention_implementations_agree_and_switch_in_all_towers(config, batch, question_answering):
    model = UMTVideoTextForPreTraining(config).eval()
    draws = build_draws(batch)
    assert model.text_model.config._attn_implementation == "sdpa"
    expected = model(**batch, **draws, return_loss=True)
    model.set_attn_implementation("eager")
    assert model.vision_model.config._attn_implementation == model.text_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**batch, **draws, return_loss=True).loss, expected.loss)
    question_answering.set_attn_implementation("eager")
    assert question_answering.answer_decoder.text_model.config._attn_implementation == "eager"


def test_flash_attention_takes_padding_masks(config, inputs):
    """FlashAttention gets masks `(B, tokens)`, and only within a sequence, where queries and keys share them."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append((type(module).__name__, None if attention_mask is None else tuple(attention_mask.shape)))
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register("padding_probe", attend)
    AttentionMaskInterface.register("padding_probe", flash_attention_mask)
    model = UMTTextModel(UMTTextConfig(**TINY_TEXT)).eval()
    video = torch.randn(4, 5, 32)
    video_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    arguments = inputs["input_ids"], inputs["attention_mask"], None, video
    real = inputs["attention_mask"].bool()
    for mask in (video_mask, None):
        model.set_attn_implementation("sdpa")
        expected = model(*arguments, mask, mode="multi_modal").last_hidden_state
        model.set_attn_implementation("padding_probe")
        states = model(*arguments, mask, mode="multi_modal").last_hidden_state
        torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=1e-5)
    assert calls[:4] == [("UMTTextSelfAttention", (4, 7))] * 4
    assert calls.count(("UMTTextCrossAttention", None)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_gpu_attention_agrees_with_sdpa(attention, question_answering, inputs):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    model = question_answering.to("cuda", torch.bfloat16)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).answer_loss
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(**inputs, labels=labels).answer_loss, expected, atol=0.1, rtol=3e-2)


def test_padding_has_no_influence_on_either_side(config, inputs):
    model = UMTVideoTextForRetrieval(config).eval()
    video = model.get_video_features(inputs["pixel_values"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = model.get_text_features(ids, mask)
    logits = model.match(video.last_hidden_state, text.last_hidden_state, mask)
    for other_ids, other_mask in (
        (torch.where(mask == 1, ids, 117), mask),
        pad_left(ids, mask),
    ):
        other = model.get_text_features(other_ids, other_mask)
        torch.testing.assert_close(other.pooler_output, text.pooler_output)
        torch.testing.assert_close(model.match(video.last_hidden_state, other.last_hidden_state, other_mask), logits)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = model.get_text_features(ids[i : i + 1, :length])
        torch.testing.assert_close(alone.pooler_output[0], text.pooler_output[i])


def test_modes_continue_one_another(inputs):
    model = UMTTextModel(UMTTextConfig(**TINY_TEXT)).eval()
    ids, mask, video = inputs["input_ids"], inputs["attention_mask"], torch.randn(4, 5, 32)
    states = model(ids, mask).last_hidden_state
    fused = model(inputs_embeds=states, attention_mask=mask, encoder_hidden_states=video, mode="fusion")
    both = model(ids, mask, encoder_hidden_states=video, mode="multi_modal", output_hidden_states=True)
    torch.testing.assert_close(fused.last_hidden_state, both.last_hidden_state)
    assert len(both.hidden_states) == 5
    torch.testing.assert_close(both.hidden_states[2], states)
    words = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=words, attention_mask=mask).last_hidden_state, states)
    for arguments, message in (
        ({"input_ids": ids, "mode": "fusion", "encoder_hidden_states": video}, "inputs_embeds"),
        ({"input_ids": ids, "mode": "multi_modal"}, "encoder_hidden_states"),
        ({"input_ids": ids, "mode": "both"}, "mode"),
        ({}, "input_ids"),
        ({"input_ids": ids.repeat(1, 3)}, "21 tokens"),
        (
            {"input_ids": ids, "encoder_hidden_states": video},
            "give mode='multi_modal' for input_ids, or mode='fusion'",
        ),
        ({"input_ids": ids, "encoder_attention_mask": torch.ones(4, 5)}, "mode='multi_modal'"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_attentions_of_both_kinds(config, inputs):
    model = UMTVideoTextForQuestionAnswering(config).eval()
    model.set_attn_implementation("eager")
    video = model.vision_model(inputs["pixel_values"]).last_hidden_state
    outputs = model.text_model(
        inputs["input_ids"],
        inputs["attention_mask"],
        encoder_hidden_states=video,
        mode="multi_modal",
        output_attentions=True,
    )
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 7, 7)] * 4
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(4, 2, 7, 32)] * 2
    assert not outputs.attentions[0][0, :, :, 4:].any()  # the first text has four tokens


def test_nothing_random_runs_without_return_loss(config, batch):
    model = UMTVideoTextForPreTraining(config).eval()
    state = torch.get_rng_state()
    outputs = model(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert outputs.loss is None and outputs.matching_logits is None and outputs.mlm_logits is None
    assert outputs.logits_per_video.shape == (4, 4)
    model(**batch, return_loss=True)
    assert not torch.equal(torch.get_rng_state(), state)


def test_logits_of_unequal_numbers_of_videos_and_texts(config, inputs):
    model = UMTVideoTextModel(config).eval()
    outputs = model(inputs["input_ids"][:3], inputs["attention_mask"][:3], inputs["pixel_values"])
    assert outputs.logits_per_video.shape == (4, 3) and outputs.logits_per_text.shape == (3, 4)
    frames = outputs.vision_model_output.frame_embeds
    torch.testing.assert_close(frames.norm(dim=-1), torch.ones(4, 2))
    assert torch.equal(outputs.video_embeds, frames.mean(dim=1))
    logits, videos = model(**inputs, return_dict=False)[:2]
    assert torch.is_tensor(logits) and logits.shape == (4, 4)
    with pytest.raises(ValueError, match="both input_ids and pixel_values"):
        model(inputs["input_ids"])


@pytest.mark.parametrize("cls", CLASSES)
def test_tuples_by_configuration(cls, config, inputs):
    config.return_dict = config.text_config.return_dict = False
    model = cls(config).eval()
    outputs = model(**inputs)
    assert isinstance(outputs, tuple) and torch.is_tensor(outputs[0])
    if cls is UMTVideoTextForQuestionAnswering:
        answers = inputs["input_ids"]
        assert len(model(**inputs, labels=answers)) == 4
        ids, _ = model.rank_answers(**inputs, answer_input_ids=answers, answer_attention_mask=answers, top_k=2)
        assert ids.shape == (4, 2)


def test_images_and_pooling(config, batch):
    """One vector per video in each case; unmasked videos have one per frame, too, whose mean it is."""
    model = UMTVideoTextForPreTraining(config).eval()
    videos = batch["pixel_values"]
    for clips, num_frames in ((videos, 2), (videos[:, :1], 1), (videos.repeat(1, 3, 1, 1, 1), 6)):
        features = model.get_video_features(clips)
        assert features.pooler_output.shape == (4, 16) and features.frame_embeds.shape == (4, num_frames, 16)
        tokens = features.last_hidden_state.unflatten(1, (num_frames, 16))
        by_hand = model.video_projection(model.video_norm(tokens.mean(2)))
        by_hand = by_hand / by_hand.square().sum(-1, keepdim=True).sqrt()
        torch.testing.assert_close(features.frame_embeds, by_hand)
        torch.testing.assert_close(features.pooler_output, by_hand.mean(1))
    masked = model.get_video_features(videos, batch["bool_masked_pos"])
    assert masked.pooler_output.shape == (4, 16) and masked.last_hidden_state.shape == (4, 8, 32)
    assert masked.frame_embeds is None
    torch.testing.assert_close(masked.pooler_output.norm(dim=-1), torch.ones(4))
    indices = compute_visible_indices(batch["bool_masked_pos"], 8)
    by_indices = model.get_video_features(videos, visible_indices=indices)
    assert torch.equal(by_indices.pooler_output, masked.pooler_output)
    model.config.pool_per_frame = False
    pooled = model.get_video_features(videos)
    assert pooled.pooler_output.shape == (4, 16) and pooled.frame_embeds is None
    vector = model.video_projection(model.video_norm(pooled.last_hidden_state.mean(1)))
    torch.testing.assert_close(pooled.pooler_output, torch.nn.functional.normalize(vector, dim=-1))


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("cls", CLASSES[:3])
def test_inner_products_with_unit_texts_are_the_scores(cls, per_frame, inputs):
    """What a library computes that takes one vector per video and the inner product: for it, and in half precision."""
    torch.manual_seed(0)
    model = cls(UMTVideoTextConfig(**TINY, pool_per_frame=per_frame)).eval()
    with torch.no_grad():
        video = model.get_video_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        outputs = model(**inputs)
        scores = video.pooler_output @ torch.nn.functional.normalize(text.pooler_output, dim=-1).T
        torch.testing.assert_close(scores / model.temperature, outputs.logits_per_video, atol=1e-6, rtol=1e-6)
        if per_frame:  # the mean cosine, frame by frame
            cosines = torch.cosine_similarity(video.frame_embeds[:, None], text.pooler_output[None, :, None], dim=-1)
            torch.testing.assert_close(scores, cosines.mean(-1))
        assert model.get_video_features(inputs["pixel_values"], return_dict=False)[1].shape == (4, 16)
        half = model.to(torch.bfloat16).get_video_features(inputs["pixel_values"].to(torch.bfloat16))
    assert half.pooler_output.dtype == torch.float32
    torch.testing.assert_close(half.pooler_output, video.pooler_output, atol=0.03, rtol=0)


def test_weights_choose_the_losses(batch):
    model = UMTVideoTextForPreTraining(UMTVideoTextConfig(**TINY, vtm_loss_weight=0, mlm_loss_weight=0.5)).eval()
    outputs = model(**batch, **build_draws(batch), return_loss=True)
    assert outputs.vtm_loss is None
    torch.testing.assert_close(outputs.loss, outputs.uta_loss + outputs.vtc_loss + 0.5 * outputs.mlm_loss)
    del batch["teacher_features"]
    outputs = model(**batch, return_loss=True)
    assert outputs.uta_loss is None and outputs.aligned_features is None


def test_teacher_features_of_all_tokens_are_gathered(config, batch):
    model = UMTVideoTextForPreTraining(config).eval()
    indices = compute_visible_indices(batch["bool_masked_pos"], 8)
    expected = model(**batch, return_loss=True).uta_loss
    visible = batch["teacher_features"].gather(2, indices[None, ..., None].expand(2, -1, -1, 12))
    outputs = model(**batch | {"teacher_features": visible}, return_loss=True)
    torch.testing.assert_close(outputs.uta_loss, expected)
    with pytest.raises(ValueError, match="differ in shape"):
        model(**batch | {"teacher_features": visible[:, :, :5]}, return_loss=True)
    with pytest.raises(ValueError, match="mlm_labels"):
        model(**batch, mlm_input_ids=batch["input_ids"], return_loss=True)


def test_alignment_is_that_of_stage_1(config, batch, tmp_path):
    """The same folder gives the same loss in both stages, but for the epsilon of the heads' norm."""
    model = UMTVideoTextForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    student = UMTVideoForPreTraining.from_pretrained(tmp_path).eval()
    expected = student(batch["pixel_values"], batch["bool_masked_pos"], batch["teacher_features"])
    outputs = model(**batch, return_loss=True)
    torch.testing.assert_close(outputs.uta_loss, expected.loss)
    torch.testing.assert_close(outputs.aligned_features, expected.aligned_features)


def test_a_single_pair_id_gives_no_matching_loss(config, batch, caplog):
    model = UMTVideoTextForRetrieval(config)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logging.getLogger("transformers").propagate = True
    transformers_logging.warning_once.cache_clear()  # another test may have brought it up
    with caplog.at_level(logging.WARNING):
        outputs = model(**inputs, pair_ids=torch.full((4,), 3), return_loss=True)
    assert "no negatives" in caplog.text
    assert outputs.vtm_loss.item() == 0
    outputs.loss.backward()
    assert model.matching_head.weight.grad is not None and not model.matching_head.weight.grad.any()
    single = {name: tensor[:1] for name, tensor in inputs.items()}
    assert model(**single, return_loss=True).vtm_loss.item() == 0


def test_negatives_drawn_by_the_model_are_not_true_pairs(config, inputs, monkeypatch):
    model = UMTVideoTextForRetrieval(config).eval()
    pair_ids = torch.tensor([0, 0, 1, 0])
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    seen, rows = [], []
    match = model.match

    def watched(*args, encoder_rows):
        seen.append(args[1][8:])
        rows.append(encoder_rows.tolist())
        return match(*args, encoder_rows=encoder_rows)

    monkeypatch.setattr(model, "match", watched)
    for _ in range(20):
        model(**inputs, pair_ids=pair_ids, return_loss=True)
    assert len(seen) == 20
    for drawn, videos in zip(seen, rows, strict=True):
        torch.testing.assert_close(drawn[0], texts[2])
        torch.testing.assert_close(drawn[1], texts[2])
        assert not torch.allclose(drawn[2], texts[2])
        assert videos[:4] == videos[8:] == [0, 1, 2, 3]
        assert [videos[4], videos[5], videos[7]] == [2, 2, 2] and videos[6] != 2


def test_temperature_is_kept_in_bounds_when_it_trains(config, inputs):
    model = UMTVideoTextModel(config).eval()
    for before, after in load_table("losses")["temperature_clamp"]["table_before_after"]:
        model.temperature.data.fill_(before)
        model(**inputs)
        assert model.temperature.item() == pytest.approx(before)
        model(**inputs, return_loss=True)
        assert model.temperature.item() == after


def test_two_forwards_before_a_backward(config, inputs):
    model = UMTVideoTextForRetrieval(config)
    first, second = model(**inputs, return_loss=True).loss, model(**inputs, return_loss=True).loss
    (first + second).backward()
    assert model.temperature.grad.abs().sum() > 0


def test_temperature_and_losses_stay_in_float32(config, batch, tmp_path):
    UMTVideoTextForPreTraining(config).save_pretrained(tmp_path)
    model = UMTVideoTextForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.temperature.dtype == torch.float32 and model.matching_head.weight.dtype == torch.bfloat16
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    outputs = model(**batch, return_loss=True)
    for name in ("uta", "vtc", "vtm", "mlm"):
        assert outputs[f"{name}_loss"].dtype == torch.float32
    assert outputs.logits_per_video.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(config, batch, reentrant):
    plain = UMTVideoTextForPreTraining(config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.text_model.layers[0].gradient_checkpointing
    draws = build_draws(batch)
    plain(**batch, **draws, return_loss=True).loss.backward()
    checkpointed(**batch, **draws, return_loss=True).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.heavy
@pytest.mark.slow
def test_compiles_to_one_graph_with_given_draws(config, batch):
    model = UMTVideoTextForPreTraining(config).eval()
    batch["visible_indices"] = compute_visible_indices(batch.pop("bool_masked_pos"), 8)
    arguments = batch | build_draws(batch) | {"pair_ids": torch.arange(4), "return_loss": True}
    expected = model(**arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**arguments)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert model.temperature.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", [UMTVideoTextForRetrieval, UMTVideoTextForPreTraining])
def test_every_parameter_gets_a_gradient(cls, config, batch):
    """No unused parameter: DDP needs no `find_unused_parameters`."""
    model = cls(config)
    if cls is UMTVideoTextForRetrieval:
        del batch["bool_masked_pos"], batch["teacher_features"]
    model(**batch, return_loss=True).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("cls", CLASSES)
def test_towers_load_from_any_folder(cls, config, inputs, tmp_path):
    model = cls(config).eval()
    model.save_pretrained(tmp_path)
    same, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name

    for tower_class, tower in ((UMTVideoModel, model.vision_model), (UMTTextModel, model.text_model)):
        loaded, info = tower_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.state_dict().keys() == tower.state_dict().keys()
        for name, tensor in tower.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    encoder = UMTVideoModel.from_pretrained(tmp_path).eval()
    expected = model.vision_model(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(encoder(inputs["pixel_values"]).pooler_output, expected)


def test_stage_2_folder_serves_retrieval_and_features(config, inputs, tmp_path):
    model = UMTVideoTextForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    for loader in (AutoModel, UMTVideoTextForRetrieval, AutoModelForPreTraining):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], loader
        torch.testing.assert_close(loaded(**inputs).logits_per_video, model(**inputs).logits_per_video)
    assert loaded.mlm_head.decoder.weight is loaded.text_model.embeddings.word_embeddings.weight
    more = UMTVideoTextConfig.from_pretrained(tmp_path)
    more.vision_config.num_frames = 6
    longer = UMTVideoTextForRetrieval.from_pretrained(tmp_path, config=more)
    assert longer.get_video_features(inputs["pixel_values"].repeat(1, 3, 1, 1, 1)).frame_embeds.shape == (4, 6, 16)


@pytest.fixture
def stage_1_folder(tmp_path):
    fields = TINY_VISION | {"num_frames": 4, "position_embedding_frames": 4, "position_embedding_image_size": 32}
    UMTVideoForPreTraining(UMTVideoConfig(**fields)).save_pretrained(tmp_path / "stage1")
    return tmp_path / "stage1"


@pytest.mark.parametrize("with_head", [True, False])
def test_stage_2_starts_from_stage_1_and_bert(with_head, stage_1_folder, inputs, tmp_path):
    fields = {name: value for name, value in TINY_TEXT.items() if name not in ("fusion_layer", "encoder_width")}
    bert = (BertForPreTraining if with_head else BertModel)(BertConfig(**fields)).eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    bert.save_pretrained(tmp_path / "bert")
    model, info = UMTVideoTextForPreTraining.from_vision_text_pretrained(
        stage_1_folder,
        tmp_path / "bert",
        vision_fields={"num_frames": 2},
        text_fields={"fusion_layer": 2},
        output_loading_info=True,
        projection_dim=16,
    )
    assert model.config.vision_config.position_embedding_frames is None
    assert model.config.vision_config.alignment_norm_eps == 1e-5 and model.config.projection_dim == 16
    student = UMTVideoForPreTraining.from_pretrained(stage_1_folder)
    for name, tensor in student.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    backbone = bert.bert if with_head else bert
    expected = backbone(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    model.eval()
    text = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(text.last_hidden_state, expected.hidden_states[2], atol=1e-5, rtol=1e-5)

    fresh = {name.split(".")[0] for name in info["missing_keys"] if ".cross_attention" not in name}
    heads = {"video_norm", "video_projection", "text_projection", "temperature", "matching_head"}
    assert fresh == (heads if with_head else heads | {"mlm_head"})
    assert {int(name.split(".")[2]) for name in info["missing_keys"] if ".cross_attention" in name} == {2, 3}
    if with_head:
        logits = model.mlm_head(expected.last_hidden_state)
        torch.testing.assert_close(logits, bert.cls.predictions(expected.last_hidden_state), atol=1e-5, rtol=1e-5)


def test_retrieval_starts_from_towers_without_the_heads_it_has_no_use_for(stage_1_folder, tmp_path):
    BertForPreTraining(BertConfig(**TINY_TEXT)).save_pretrained(tmp_path / "bert")
    arguments = {"text_fields": {"fusion_layer": 2}, "output_loading_info": True}
    model, info = UMTVideoTextForRetrieval.from_vision_text_pretrained(stage_1_folder, tmp_path / "bert", **arguments)
    assert type(model) is UMTVideoTextForRetrieval
    assert not any(name.startswith(("vision_model", "alignment")) for name in info["missing_keys"])
    with pytest.raises(ValueError, match="not a BERT"):
        UMTVideoTextForRetrieval.from_vision_text_pretrained(stage_1_folder, stage_1_folder)
    with pytest.raises(ValueError, match="not a UMT video encoder"):
        UMTVideoTextForRetrieval.from_vision_text_pretrained(tmp_path / "bert", tmp_path / "bert")
    with pytest.raises(ValueError, match="4 layers"):
        UMTVideoTextForRetrieval.from_vision_text_pretrained(stage_1_folder, tmp_path / "bert")


def test_question_answering_starts_from_stage_2(config, inputs, tmp_path):
    """The decoder is made of the fusion layers, the embeddings and the language-modelling head."""
    source = UMTVideoTextForPreTraining(config).eval()
    source.save_pretrained(tmp_path)
    model = UMTVideoTextForQuestionAnswering.from_pretraining(tmp_path)
    decoder = model.answer_decoder
    assert decoder.config.num_hidden_layers == 2 and decoder.config.is_decoder
    for i in range(2):
        for name, tensor in source.text_model.layers[2 + i].state_dict().items():
            assert torch.equal(decoder.text_model.layers[i].state_dict()[name], tensor), name
    for name, tensor in source.mlm_head.state_dict().items():
        assert torch.equal(decoder.lm_head.state_dict()[name], tensor), name
    assert decoder.lm_head.decoder.weight is decoder.text_model.embeddings.word_embeddings.weight
    assert decoder.lm_head.decoder.weight is not model.text_model.embeddings.word_embeddings.weight
    # Towers that shared memory would be trained as one, and could not be saved.
    places = [tensor.data_ptr() for tensor in model.parameters()]
    assert len(set(places)) == len(places)
    assert model.name_or_path == str(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    video = source.vision_model(inputs["pixel_values"]).last_hidden_state
    expected = source.text_model(
        inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=video, mode="multi_modal"
    ).last_hidden_state
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)

    UMTVideoTextForRetrieval(config).save_pretrained(tmp_path / "retrieval")
    with pytest.raises(ValueError, match="lacks mlm_head"):
        UMTVideoTextForQuestionAnswering.from_pretraining(tmp_path / "retrieval")
    wide = UMTVideoTextConfig(**TINY | {"text_config": TINY_TEXT | {"hidden_size": 48}})
    UMTVideoTextForPreTraining(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="width 32"):
        UMTVideoTextForQuestionAnswering.from_pretraining(tmp_path / "wide")


def test_answers_are_shifted_weighted_and_counted(question_answering, inputs):
    model = question_answering
    answers = torch.tensor([[101, 105, 102, -100], [101, 106, 107, 102], [101, 108, 102, -100]])
    two = {name: tensor[:2] for name, tensor in inputs.items()}
    counts, weights = torch.tensor([2, 1]), torch.tensor([0.5, 0.25, 1.0])
    outputs = model(**two, labels=answers, answers_per_question=counts, answer_weights=weights)
    log_probs = outputs.logits.log_softmax(-1)
    expected = -torch.stack(
        [
            log_probs[0, 0, 105] + log_probs[0, 1, 102],
            log_probs[1, 0, 106] + log_probs[1, 1, 107] + log_probs[1, 2, 102],
            log_probs[2, 0, 108] + log_probs[2, 1, 102],
        ]
    )
    torch.testing.assert_close(outputs.answer_loss, expected)
    torch.testing.assert_close(outputs.loss, (expected * weights).sum() / 2)
    padded = answers.masked_fill(answers == -100, 0)
    explicit = model(**two, decoder_input_ids=padded, answers_per_question=counts)
    assert explicit.loss is None
    torch.testing.assert_close(explicit.logits, outputs.logits)
    with pytest.raises(ValueError, match="3 answers, expected 2"):
        model(**two, labels=answers)


def test_generation(question_answering, inputs):
    """Greedy, beam and sampled answers; with and without a cache; padding on either side."""
    model = question_answering
    arguments = {"max_new_tokens": 6}
    answers = model.generate(**inputs, **arguments, do_sample=False)
    assert answers.shape[0] == 4 and (answers[:, 0] == 101).all()
    assert len({tuple(row) for row in answers.tolist()}) > 1

    # Greedy by hand, every token from the start again.
    ids = torch.full((4, 1), 101)
    for _ in range(answers.shape[1] - 1):
        logits = model(**inputs, decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    for ours, expected in zip(answers.tolist(), ids.tolist(), strict=True):
        length = expected.index(102) + 1 if 102 in expected else len(expected)
        assert ours[:length] == expected[:length] and not any(ours[length:])

    for options in ({"do_sample": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        cached = model.generate(**inputs, **arguments, **options)
        assert torch.equal(model.generate(**inputs, **arguments, **options, use_cache=False), cached)
        ids, mask = pad_left(inputs["input_ids"], inputs["attention_mask"])
        left = model.generate(inputs["pixel_values"], ids, mask, **arguments, **options)
        assert torch.equal(left, cached)
    assert cached.shape[0] == 8
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(model.generate(**inputs, **arguments, do_sample=True, use_cache=use_cache))
    assert torch.equal(*draws)


def test_generation_stops_at_the_end_of_an_answer(question_answering, inputs):
    decoder = question_answering.answer_decoder
    with torch.no_grad():
        decoder.lm_head.decoder.bias[102] = 1e3
    answers = question_answering.generate(**inputs, max_new_tokens=6)
    assert answers.tolist() == [[101, 102]] * 4
    outputs = question_answering.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(outputs.sequences, answers) and len(outputs.scores) == 1


@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_question_answering_returns_what_is_asked_of_each_part(question_answering, inputs, kind):
    model = question_answering
    model.set_attn_implementation("eager")
    labels = inputs["input_ids"][:, :5]
    plain = model(**inputs, labels=labels)
    asked = model(**inputs, labels=labels, **{f"output_{kind}": True})
    torch.testing.assert_close(asked.logits, plain.logits)
    expected = {
        "hidden_states": {
            "hidden_states": [(4, 7, 32)] * 5,
            "decoder_hidden_states": [(4, 5, 32)] * 3,
        },
        "attentions": {
            "attentions": [(4, 2, 7, 7)] * 4,
            "cross_attentions": [(4, 2, 7, 32)] * 2,
            "decoder_attentions": [(4, 2, 5, 5)] * 2,
            "decoder_cross_attentions": [(4, 2, 5, 7)] * 2,
        },
    }[kind]
    for name, shapes in expected.items():
        assert [tuple(part.shape) for part in asked[name]] == shapes, name
        assert name not in plain
    if kind == "hidden_states":
        torch.testing.assert_close(asked.hidden_states[-1], asked.last_hidden_state)
    else:
        for name in expected:
            sums = torch.cat([part.sum(-1).flatten() for part in asked[name]])
            torch.testing.assert_close(sums, torch.ones_like(sums))
        assert not asked.decoder_attentions[0].triu(1).any()  # the decoder does not see later words
        assert not asked.decoder_cross_attentions[0][0, :, :, 4:].any()  # the first question has four tokens
    video = asked.video_outputs
    assert "video_outputs" not in plain and len(video[kind]) == 3 + (kind == "hidden_states")
    assert {*asked.keys()} - {*plain.keys()} == {*expected, "video_outputs"}
    # Without answers, those of the question alone; as a tuple, the encoder's output is one, too.
    question = model(**inputs, **{f"output_{kind}": True})
    assert {*question.keys()} == {"last_hidden_state", "video_outputs"} | {n for n in expected if "decoder" not in n}
    as_tuple = model(**inputs, **{f"output_{kind}": True}, return_dict=False)
    assert isinstance(as_tuple[-1], tuple) and torch.equal(as_tuple[-1][0], video.last_hidden_state)


def test_matching_says_where_each_word_looks(config, inputs):
    model = UMTVideoTextForRetrieval(config).eval()
    model.set_attn_implementation("eager")
    video = model.get_video_features(inputs["pixel_values"]).last_hidden_state
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    logits = model.match(video, text, inputs["attention_mask"])
    assert torch.is_tensor(logits) and torch.equal(model.match(video, text, inputs["attention_mask"]), logits)
    outputs = model.match(video, text, inputs["attention_mask"], output_attentions=True, output_hidden_states=True)
    assert torch.equal(outputs.logits, logits)
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(4, 2, 7, 32)] * 2
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 7, 7)] * 2
    assert len(outputs.hidden_states) == 3 and torch.equal(outputs.hidden_states[0], text)
    # By hand: queries of the words that left the first fusion layer's self-attention, keys of the video.
    layer = model.text_model.layers[2]
    words = layer.attention_norm(text + layer.attention(text, attention_bias(inputs), None)[0])
    queries, keys = layer.cross_attention.q_proj(words), layer.cross_attention.k_proj(video)
    scores = queries.unflatten(-1, (2, 16)).transpose(1, 2) @ keys.unflatten(-1, (2, 16)).permute(0, 2, 3, 1)
    torch.testing.assert_close(outputs.cross_attentions[0], (scores / 4).softmax(-1))
    assert model.match(video, text, inputs["attention_mask"], output_attentions=False).shape == (4, 2)


def attention_bias(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Added to scores: nothing at tokens, minus infinity at padding."""
    return torch.zeros(4, 1, 1, 7).masked_fill(inputs["attention_mask"][:, None, None] == 0, -torch.inf)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size", [210, 90])
def test_another_vocabulary_survives_saving(tmp_path, cls, config, inputs, size):
    model = cls(config).eval()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=size - 1)
    if cls is UMTVideoTextForQuestionAnswering:
        inputs["labels"] = inputs["input_ids"]
    kept = min(size, 120)
    words = model.get_input_embeddings().weight[:kept].clone()
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    model.save_pretrained(tmp_path)
    reloaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reloaded.config.text_config.vocab_size == size
    assert {name: tensor.shape for name, tensor in reloaded.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    torch.testing.assert_close(reloaded.get_input_embeddings().weight[:kept], words)
    with torch.no_grad():
        for ours, theirs in zip(
            reloaded(**inputs, return_dict=False), model(**inputs, return_dict=False), strict=True
        ):
            if torch.is_tensor(ours):
                torch.testing.assert_close(ours, theirs)
    if cls is UMTVideoTextForQuestionAnswering:
        decoder = reloaded.answer_decoder
        assert decoder.config.vocab_size == size and reloaded(**inputs).logits.shape[-1] == size
        assert decoder.lm_head.decoder.weight is decoder.get_input_embeddings().weight


def test_generation_settings_travel_with_the_folder(tmp_path, question_answering, inputs):
    model = question_answering
    assert model.can_generate() and (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        102,
        0,
    )
    with torch.no_grad():
        model.answer_decoder.lm_head.decoder.bias[102] = -1e3  # answers do not end by themselves
    today = model.generate(**inputs)
    assert today.shape == (4, 20)  # as before: until the position table ends
    model.generation_config.max_new_tokens, model.generation_config.num_beams = 4, 3
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(tmp_path)
    for loaded in (
        UMTVideoTextForQuestionAnswering.from_pretrained(tmp_path),
        AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path),
    ):
        settings = loaded.generation_config
        assert (settings.max_new_tokens, settings.num_beams, settings.no_repeat_ngram_size) == (4, 3, 1)
        expected = model.generate(**inputs, max_new_tokens=4, num_beams=3, no_repeat_ngram_size=1)
        assert expected.shape == (4, 5) and torch.equal(loaded.generate(**inputs), expected)
        greedy = loaded.generate(**inputs, max_new_tokens=2, num_beams=1, no_repeat_ngram_size=0)
        assert torch.equal(greedy, today[:, :3])  # what a call says goes first
        given = GenerationConfig(
            max_new_tokens=3, do_sample=False, num_beams=1, no_repeat_ngram_size=0, use_cache=False
        )
        assert torch.equal(loaded.generate(**inputs, generation_config=given), today[:, :4])
    (tmp_path / "generation_config.json").unlink()  # a folder from before
    older = UMTVideoTextForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(older.generate(**inputs), today)


def test_cross_attention_is_projected_once(question_answering, inputs):
    calls = []
    layer = question_answering.answer_decoder.text_model.layers[0].cross_attention
    layer.k_proj.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        question_answering.answer_decoder.lm_head.decoder.bias[102] = -1e3
    question_answering.generate(**inputs, max_new_tokens=5)
    assert len(calls) == 1


def test_decoder_alone(inputs):
    config = build_decoder_config(UMTTextConfig(**TINY_TEXT))
    decoder = UMTTextLMHeadModel(config).eval()
    states = torch.randn(4, 5, 32)
    ids = torch.randint(104, 120, (4, 6))
    outputs = decoder(ids, encoder_hidden_states=states, labels=ids, use_cache=True)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    changed = ids.clone()
    changed[:, 4] = 104 + (changed[:, 4] - 103) % 16
    other = decoder(changed, encoder_hidden_states=states).logits
    torch.testing.assert_close(other[:, :4], outputs.logits[:, :4])
    assert not torch.allclose(other[:, 4], outputs.logits[:, 4])
    last = decoder(ids, encoder_hidden_states=states, logits_to_keep=1).logits
    torch.testing.assert_close(last, outputs.logits[:, -1:])
    with pytest.raises(ValueError, match="is_decoder"):
        UMTTextLMHeadModel(UMTTextConfig(**TINY_TEXT))


def test_vocabulary_grows_with_the_head(config, batch):
    model = UMTVideoTextForPreTraining(config)
    model.resize_token_embeddings(130)
    assert model.mlm_head.decoder.weight is model.text_model.embeddings.word_embeddings.weight
    assert model.config.text_config.vocab_size == 130
    assert model(**batch, return_loss=True).mlm_logits.shape == (4, 7, 130)


def test_lora_in_both_towers(config, inputs, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    retrieval = UMTVideoTextForRetrieval(config).eval()
    base = copy.deepcopy(retrieval)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["matching_head"], r=4)
    model = get_peft_model(retrieval, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model.eval()(**inputs).logits_per_video
    assert not torch.allclose(expected, base(**inputs).logits_per_video)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits_per_video, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits_per_video, expected, atol=1e-4, rtol=1e-4)


def test_sharding_plan_names_modules_that_exist():
    import fnmatch

    names = [name for name, _ in UMTTextModel(UMTTextConfig(**TINY_TEXT)).named_modules()]
    for pattern in UMTTextConfig.base_model_fsdp_plan:
        assert fnmatch.filter(names, pattern), pattern
