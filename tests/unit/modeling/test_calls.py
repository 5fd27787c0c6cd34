"""What every class does with its arguments: tuples, raw pixels, chosen hidden states."""

import inspect
import itertools

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import ModelOutput

from umt_hf import UMTTeacher, UMTTextModel, UMTVideoProcessor, UMTVideoTextForQuestionAnswering, UMTVideoTextModel
from umt_hf.modeling.modeling_umt_text import MODE_PLACE

from .tiny_models import ALL_CLASSES, PIXEL_CLASSES, VIDEO_TEXT_CLASSES, build_inputs, build_model

SELECTS_STATES = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="Transformers 5.24 is the first to select hidden states",
)


def list_tensors(value: object) -> list[torch.Tensor]:
    """Tensors of an output, in order, as nested as it is."""
    if isinstance(value, ModelOutput):
        value = value.to_tuple()
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in list_tensors(item)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("by_configuration", [False, True])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
@torch.no_grad()
def test_every_class_returns_tuples(model_class, by_configuration, tmp_path):
    model, inputs = build_model(model_class), build_inputs(model_class)
    if hasattr(model, "alignment_heads"):
        inputs["teacher_features"] = torch.ones(2, 2, 32, 16)
    arguments = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    expected = list_tensors(model(**inputs, **arguments))
    if by_configuration:
        model.save_pretrained(tmp_path)
        outputs = model_class.from_pretrained(tmp_path, return_dict=False)(**inputs, **arguments)
    else:
        outputs = model(**inputs, **arguments, return_dict=False)
    assert type(outputs) is tuple
    for tensor, wanted in zip(list_tensors(outputs), expected, strict=True):
        torch.testing.assert_close(tensor, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("model_class", PIXEL_CLASSES)
def test_raw_pixels_are_refused_with_the_cure(model_class, dtype):
    model, inputs = build_model(model_class), build_inputs(model_class)
    inputs["pixel_values"] = (inputs["pixel_values"] > 0).to(dtype)
    calls = [lambda: model(**inputs)]
    if hasattr(model, "get_video_features"):
        calls.append(lambda: model.get_video_features(inputs["pixel_values"]))
    if model_class is UMTVideoTextForQuestionAnswering:
        ids = inputs["input_ids"]
        calls.append(lambda: model.generate(inputs["pixel_values"], ids))
        calls.append(lambda: model.rank_answers(inputs["pixel_values"], ids, None, ids, torch.ones_like(ids), top_k=1))
    for call in calls:
        with pytest.raises(ValueError, match=f"pixel_values are {dtype}.*processor"):
            call()


def test_the_teacher_refuses_raw_pixels():
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    teacher = UMTTeacher(CLIPVisionModelWithProjection(config), num_aligned_layers=1)
    with pytest.raises(ValueError, match=r"torch\.uint8.*processor"):
        teacher(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8))


@SELECTS_STATES
@pytest.mark.parametrize("mode,num_states", [("text", 3), ("fusion", 3), ("multi_modal", 5)])
@torch.no_grad()
def test_indices_of_hidden_states_count_the_layers_that_run(mode, num_states):
    model, inputs = build_model(UMTTextModel), build_inputs(UMTTextModel)
    arguments = {"attention_mask": inputs["attention_mask"], "mode": mode}
    arguments |= {"inputs_embeds": torch.randn(2, 7, 64)} if mode == "fusion" else {"input_ids": inputs["input_ids"]}
    if mode != "text":
        arguments["encoder_hidden_states"] = torch.randn(2, 5, 64)
    every = model(**arguments, output_hidden_states=True).hidden_states
    assert len(every) == num_states
    for wanted in ([-1], [0, -2], [1], -1, [num_states], [-num_states - 1], [-1, 0]):
        states = model(**arguments, output_hidden_states=wanted).hidden_states
        indices = [wanted] if isinstance(wanted, int) else wanted
        kept = {index % num_states for index in indices if -num_states <= index < num_states}
        assert [index for index, state in enumerate(states) if state is not None] == sorted(kept)
        assert all(torch.equal(states[index], every[index]) for index in kept)


@SELECTS_STATES
@pytest.mark.parametrize("model_class", VIDEO_TEXT_CLASSES[:3])
@torch.no_grad()
def test_both_towers_count_their_own_layers(model_class):
    model, inputs = build_model(model_class), build_inputs(model_class)
    outputs = model(**inputs, output_hidden_states=[-1])
    for output, num_layers in ((outputs.vision_model_output, 3), (outputs.text_model_output, 2)):
        assert [state is not None for state in output.hidden_states] == [False] * num_layers + [True]


def test_the_place_of_mode_among_the_arguments():
    assert list(inspect.signature(UMTTextModel.forward).parameters)[1:][MODE_PLACE] == "mode"


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("num_frames", [None, 2, 4])
def test_an_odd_layout_is_named_as_it_was_given(kind, batched, num_frames):
    video = kind(np.zeros((3, 8, 40, 60), dtype=np.uint8))
    options = {} if num_frames is None else {"num_frames": num_frames}
    with pytest.raises(ValueError, match=r"\(3, 8, 40, 60\).*\(C, T, H, W\)"):
        UMTVideoProcessor(num_frames=4)([video, video] if batched else video, **options)
    with pytest.raises(ValueError, match=r"\(8, 5, 40, 60\), which is neither"):
        UMTVideoProcessor(num_frames=4)(kind(np.zeros((8, 5, 40, 60), dtype=np.uint8)))


def test_pairs_of_texts_alone_need_no_pixels():
    """The checks of pixels are not in the way of texts."""
    model, inputs = build_model(UMTVideoTextModel), build_inputs(UMTVideoTextModel)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    one, other = (model.get_text_features(**texts).pooler_output for _ in range(2))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(one, other))
