"""The text tower in each mode, its language-modelling head and its causal form, against the published ones."""

import pytest
import torch

from tests.parity.multi_modality import assert_equal, load_case
from umt_hf.modeling.configuration_umt_video_text import UMTTextConfig
from umt_hf.modeling.losses_umt import mlm_loss
from umt_hf.modeling.modeling_umt_text import UMTTextLMHeadModel, UMTTextModel
from umt_hf.modeling.towers_umt_video_text import rename_bert_weight


@pytest.fixture(scope="module")
def case():
    return load_case("text_encoder")


def build_tower(case, attention: str, **fields) -> UMTTextModel:
    info, data = case
    config = {name: value for name, value in info["config"].items() if name != "hidden_act"}
    model = UMTTextModel(UMTTextConfig(**config, attn_implementation=attention, **fields)).eval()
    converted = {rename_bert_weight(name): tensor for name, tensor in data["weights"].items()}
    state = {name.removeprefix("text_model."): t for name, t in converted.items() if name.startswith("text_model.")}
    model.load_state_dict({name: tensor for name, tensor in state.items() if "position_ids" not in name})
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_modes(case, attention):
    _, data = case
    inputs, outputs = data["inputs"], data["outputs"]
    model = build_tower(case, attention)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    vision, vision_mask = inputs["vision_embeds"], inputs["vision_mask"]

    text = model(ids, mask, output_hidden_states=True)
    for i in range(3):
        assert_equal(text.hidden_states[i], outputs[f"text/hidden_{i}"], f"text {i}")
    assert torch.equal(text.pooler_output, text.last_hidden_state[:, 0])
    assert_equal(model(ids).last_hidden_state, outputs["text_no_attention_mask/last_hidden"])

    given = {"inputs_embeds": text.last_hidden_state, "attention_mask": mask, "encoder_hidden_states": vision}
    fused = model(**given, mode="fusion", output_hidden_states=True)
    for i in range(3):
        assert_equal(fused.hidden_states[i], outputs[f"fusion_vmask_none/hidden_{i}"], f"fusion {i}")
    masked = model(**given, encoder_attention_mask=vision_mask, mode="fusion").last_hidden_state
    assert_equal(masked, outputs["fusion_vmask_partial/last_hidden"])

    both = model(ids, mask, encoder_hidden_states=vision, mode="multi_modal").last_hidden_state
    assert_equal(both, outputs["multi_modal_vmask_none/last_hidden"])
    both = model(
        ids, mask, encoder_hidden_states=vision, encoder_attention_mask=vision_mask, mode="multi_modal"
    ).last_hidden_state
    assert_equal(both, outputs["multi_modal_vmask_partial/last_hidden"])
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(ids, mask, mode="multi_modal")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_causal(case, attention):
    _, data = case
    inputs = data["inputs"]
    model = build_tower(case, attention, is_decoder=True)
    states = model(
        inputs["input_ids"],
        inputs["attention_mask"],
        encoder_hidden_states=inputs["vision_embeds"],
        mode="multi_modal",
    ).last_hidden_state
    assert_equal(states, data["outputs"]["multi_modal_causal/last_hidden"])


def test_language_modelling_head(case):
    info, data = case
    config = {name: value for name, value in info["config"].items() if name != "hidden_act"}
    model = UMTTextLMHeadModel(UMTTextConfig(**config, is_decoder=True)).eval()
    converted = {rename_bert_weight(name): tensor for name, tensor in data["weights"].items()}
    head = {name.removeprefix("mlm_head."): t for name, t in converted.items() if name.startswith("mlm_head.")}
    model.lm_head.load_state_dict(head)
    logits = model.lm_head(data["outputs"]["fusion_vmask_none/hidden_2"])
    assert_equal(logits, data["outputs"]["mlm_head/logits"])
    loss = mlm_loss(logits, data["inputs"]["labels"])
    assert loss.item() == pytest.approx(data["outputs"]["mlm_head/loss"].item(), rel=1e-5)
