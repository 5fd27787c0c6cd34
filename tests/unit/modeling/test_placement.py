"""Models come up in the precision and on the devices that were asked for, and are saved as they were loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, BertConfig, BertForPreTraining

from umt_hf import (
    UMTTextLMHeadModel,
    UMTVideoForPreTraining,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

from .tiny_models import (
    ALL_CLASSES,
    VIDEO_TEXT_CLASSES,
    build_inputs,
    build_model,
    list_features,
)

TOWERS = {"UMTVideoLayer", "UMTTextLayer"}
IS_OLD = Version(transformers.__version__) < Version("5.24")
PLACES_TIED_WEIGHTS = pytest.mark.skipif(
    IS_OLD, reason="Transformers 5.4 compares the values of tied weights, which are not there on disk and meta"
)


def load_offloaded(load: Callable[..., Any], folder: Path, max_bytes: int) -> Any:
    """Load with a part of the weights on disk; skips where Transformers itself fails, with BERT as well.

    Transformers 5.4 runs no model that is on disk from first to last layer, and loses tied weights that go to disk.
    """
    model = load(folder, device_map="auto", max_memory={"cpu": max_bytes}, offload_folder=folder / "offloaded").eval()
    placed = getattr(model, "hf_device_map", {"": "disk"})
    if IS_OLD:
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        on_disk = tuple(name for name, device in placed.items() if device == "disk")
        if on_disk == ("",) or any(weight.startswith(on_disk) for weight in tied):
            pytest.skip("Transformers 5.4 cannot offload all weights, or tied ones, of any model")
    assert "disk" in placed.values()
    return model


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.95])
@torch.no_grad()
def test_each_part_can_be_offloaded(model_class, share, tmp_path):
    """As Transformers' users ask for it; the share of the weights that stays in memory decides which parts go."""
    model, inputs = build_model(model_class), build_inputs(model_class)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    offloaded = load_offloaded(model_class.from_pretrained, tmp_path / "model", int(share * size))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    expected = list_features(model(**inputs))
    for _ in range(2):
        for name, feature in list_features(offloaded(**inputs)).items():
            assert torch.equal(feature, expected[name]), name


@pytest.mark.parametrize("share", [0.1, 0.5])
@torch.no_grad()
def test_calls_beside_forward_work_offloaded(share, tmp_path):
    for model_class in (UMTVideoTextForRetrieval, UMTVideoTextForQuestionAnswering):
        folder = tmp_path / model_class.__name__
        model, inputs = build_model(model_class), build_inputs(model_class)
        model.save_pretrained(folder)
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        offloaded = load_offloaded(model_class.from_pretrained, folder, int(share * size))
        question = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        results = []
        for one in (model, offloaded):
            if model_class is UMTVideoTextForQuestionAnswering:
                answers = torch.tensor([[101, 110, 102], [101, 111, 102]])
                ranked = one.rank_answers(**question, answer_input_ids=answers, answer_attention_mask=answers, top_k=2)
                results.append([one.generate(**question, max_new_tokens=4, min_new_tokens=4), *ranked])
            else:
                video = one.get_video_features(question["pixel_values"]).last_hidden_state
                text = one.get_text_features(question["input_ids"], question["attention_mask"]).last_hidden_state
                results.append([one.match(video, text, question["attention_mask"])])
        for expected, result in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, atol=0, rtol=0)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_layers_alone_are_kept_together(model_class):
    """FSDP2 wraps what a model names here, and fails on a class that the model lacks."""
    model = build_model(model_class)
    present = {type(module).__name__ for module in model.modules()}
    expected = TOWERS & present
    if model_class is UMTVideoTextForQuestionAnswering:
        expected.add("UMTTextLMHeadModel")  # see there
    assert set(model._no_split_modules) == expected


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_is_of_the_precision_asked_for_and_is_saved_so(model_class, dtype, tmp_path):
    build_model(model_class).save_pretrained(tmp_path / "float32")
    model = model_class.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = model_class.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    for name, parameter in again.named_parameters():
        assert parameter.dtype == (torch.float32 if name == "temperature" else dtype), name
    assert AutoModel.from_pretrained(tmp_path / "saved").dtype == dtype or model_class is UMTTextLMHeadModel


@pytest.mark.parametrize("model_class", VIDEO_TEXT_CLASSES)
def test_inputs_brought_to_the_models_precision_run(model_class, tmp_path):
    build_model(model_class).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = build_inputs(model_class)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    assert all(feature.isfinite().all() for feature in list_features(model(**inputs)).values())


@pytest.fixture
def stage_2_folder(tmp_path):
    build_model(UMTVideoTextForPreTraining).save_pretrained(tmp_path / "stage2")
    return tmp_path / "stage2"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "float16"])
@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_question_answering_starts_as_asked_for(stage_2_folder, dtype, device_map):
    options = {} if dtype is None else {"dtype": dtype}
    options |= {} if device_map is None else {"device_map": device_map}
    model = UMTVideoTextForQuestionAnswering.from_pretraining(stage_2_folder, **options)
    wanted = {None: torch.float32, "float16": torch.float16}.get(dtype, dtype)
    assert model.dtype == wanted and {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert not model.training
    expected = UMTVideoTextForQuestionAnswering.from_pretraining(stage_2_folder).to(wanted).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    tied = model.answer_decoder.lm_head.decoder.weight
    assert tied is model.answer_decoder.text_model.embeddings.word_embeddings.weight


@PLACES_TIED_WEIGHTS
def test_question_answering_starts_on_the_device_asked_for(stage_2_folder):
    model = UMTVideoTextForQuestionAnswering.from_pretraining(stage_2_folder, device_map="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


@PLACES_TIED_WEIGHTS
@torch.no_grad()
def test_question_answering_starts_offloaded(stage_2_folder):
    model = UMTVideoTextForQuestionAnswering.from_pretraining(stage_2_folder)
    inputs = build_inputs(UMTVideoTextForQuestionAnswering)
    offloaded = load_offloaded(UMTVideoTextForQuestionAnswering.from_pretraining, stage_2_folder, 300_000)
    assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_stage_2_starts_as_asked_for(dtype, tmp_path):
    build_model(UMTVideoForPreTraining).save_pretrained(tmp_path / "stage1")
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    BertForPreTraining(BertConfig(vocab_size=120, max_position_embeddings=20, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    options = {} if dtype is None else {"dtype": dtype, "device_map": "cpu"}
    for model_class in (UMTVideoTextModel, UMTVideoTextForRetrieval, UMTVideoTextForPreTraining):
        model = model_class.from_vision_text_pretrained(
            tmp_path / "stage1", tmp_path / "bert", text_fields={"fusion_layer": 2}, **options
        )
        assert model.dtype == (dtype or torch.float32) and model.temperature.dtype == torch.float32
        assert {p.dtype for p in model.vision_model.parameters()} == {model.dtype}
        assert model.config.dtype == model.dtype
