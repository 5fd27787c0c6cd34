"""The frozen teacher in 8 bits: its features stay close, what cannot run is refused, and nothing else changes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from umt_hf.teachers.quantization import CONFIGS, quantize_teacher, require_quantization
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import compute_targets, load_teacher
from umt_hf.training.arguments import TeacherArguments

NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
ON_CPU = ["int8_weight_only", "int8_dynamic"]


def build_tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=128,
            projection_dim=24,
        )
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    build_tower().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, quantization: str | None, precision: str = "no") -> UMTTeacher:
    args = TeacherArguments(teacher_name_or_path=str(folder), num_aligned_layers=2, teacher_quantization=quantization)
    return load_teacher(args, "sdpa", Accelerator(cpu=True, mixed_precision=precision))


def give_targets(teacher: UMTTeacher, mask_type: str = "attention") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 4, 3, 32, 32, generator=generator)
    noise = torch.empty(2, 64).exponential_(generator=generator)
    return compute_targets(teacher, pixel_values.to(next(teacher.parameters()).dtype), noise, mask_type, 0.75)[1]


@NEEDS_TORCHAO
@pytest.mark.parametrize("mask_type", ["tube", "random"])  # masks that do not depend on the saliency
@pytest.mark.parametrize("name", ON_CPU)
def test_targets_stay_close_and_are_frozen(name, mask_type, folder):
    exact, coarse = (give_targets(load(folder, chosen), mask_type) for chosen in (None, name))
    cosine = nn.functional.cosine_similarity(exact, coarse, dim=-1)
    assert cosine.min() > 0.995 and not torch.equal(exact, coarse)
    assert coarse.dtype == torch.float32 and not coarse.requires_grad


@NEEDS_TORCHAO
@pytest.mark.parametrize("name", ON_CPU)
def test_the_layers_are_quantised_and_nothing_else(name, folder):
    teacher = load(folder, name)
    plain = {
        key
        for key, module in teacher.vision_tower.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
    }
    assert plain == {"visual_projection"}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_without_torchao_the_extra_is_named(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(
        ImportError, match=r"teacher_quantization=int8_dynamic needs torchao, .*umt_hf\[quantization\]"
    ):
        load(folder, "int8_dynamic")
    load(folder, None)


@NEEDS_TORCHAO
def test_fp8_without_its_gpu_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"fp8_dynamic needs a GPU of compute capability 8\.9 .* on cpu"):
        load(Path("not-there"), "fp8_dynamic")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="must be one of int8_weight_only, int8_dynamic, fp8_dynamic"):
        require_quantization("int4", torch.device("cpu"))


def test_the_flag_has_the_names_that_are_known():
    from typing import get_args, get_type_hints

    literal, _ = get_args(get_type_hints(TeacherArguments)["teacher_quantization"])
    assert list(get_args(literal)) == list(CONFIGS)


@NEEDS_TORCHAO
def test_fp8_is_asked_of_torchao_where_a_gpu_has_it(monkeypatch):
    """No such GPU is here: what would be asked, not what would come of it."""
    import torchao.quantization

    asked = []
    monkeypatch.setattr("umt_hf.teachers.quantization.require_quantization", lambda *_: None)
    monkeypatch.setattr(torchao.quantization, "quantize_", lambda *given, **_: asked.append(given))
    teacher = UMTTeacher(build_tower(), num_aligned_layers=2)
    quantize_teacher(teacher, "fp8_dynamic")
    ((layers, config),) = asked
    assert layers is teacher.vision_tower.vision_model.encoder.layers
    assert type(config) is torchao.quantization.Float8DynamicActivationFloat8WeightConfig
