"""A teacher by its name: complete models and towers alone, what is missing, what cannot teach, and its own pixels."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from umt_hf import UMTTeacher, UMTVideoConfig, UMTVideoModel
from umt_hf.inference.loading import keep_tokens
from umt_hf.runs.arguments import KeptTokenArguments
from umt_hf.teachers import teacher as teachers
from umt_hf.teachers.saliency import load_choosing_teacher
from umt_hf.training.alignment import check_grids, describe_alignment, load_teacher
from umt_hf.training.arguments import MaskArguments, TeacherArguments

from .towers import INSTALLED, SIZES, WIDE, build_tower

# A weight of each kind that a folder may lack, as the tower names it.
LACKING = {
    "metaclip_2": "visual_projection.weight",
    "siglip": "head.probe",
    "dinov2": "layernorm.weight",
    "dinov2_with_registers": "embeddings.register_tokens",
    "dinov3_vit": "norm.weight",
    "tipsv2": "embeddings.position_embeddings",
}


@pytest.fixture(params=[kind for kind in INSTALLED if kind in LACKING])
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    build_tower(kind).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def test_a_folder_gives_the_same_teacher_as_its_tower(kind, folder):
    video = torch.randn(1, 2, 3, 32, 32)
    loaded, own = UMTTeacher.from_pretrained(str(folder), 2), UMTTeacher(build_tower(kind), 2)
    for found, expected in zip(vars(loaded(video)).values(), vars(own(video)).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_weights_that_are_missing_or_misshapen_are_named(kind, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    stored = "pos_embed" if kind == "tipsv2" else LACKING[kind]  # whose files have other names
    (name,) = [name for name in weights if name.endswith(stored)]
    half = shutil.copytree(folder, tmp_path / "half")
    save_file(
        {key: value for key, value in weights.items() if key != name}, half / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=rf"half is not a complete .* tower.*: it lacks .*{LACKING[kind]}"):
        UMTTeacher.from_pretrained(str(half), 2)
    save_file({**weights, name: torch.zeros(5)}, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"half holds .*{LACKING[kind]} in shape \(5,\), which should be"):
        UMTTeacher.from_pretrained(str(half), 2)


def test_the_students_configuration_follows_the_teacher(kind, folder):
    args = TeacherArguments(teacher_name_or_path=str(folder), num_aligned_layers=2)
    teacher = load_teacher(args, "sdpa", Accelerator(cpu=True))
    fields = describe_alignment(args, MaskArguments(), teacher)
    assert fields["teacher_hidden_size"] == teacher.hidden_size == (12 if kind == "metaclip_2" else 24)
    assert fields["teacher_image_size"] == 32
    # As a patch of 16 beside CLIP's of 14: the error says in which size the teacher has the student's grid.
    with pytest.raises(ValueError, match=r"14 x 14 patches .* the teacher 4 x 4; set teacher_image_size=112"):
        check_grids(UMTVideoConfig(image_size=224, patch_size=16), teacher)


def test_a_teacher_of_any_kind_chooses_the_tokens_that_are_kept(kind, folder):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = UMTVideoConfig(image_size=48, patch_size=16, num_frames=2, num_aligned_layers=1, **sizes)
    model, video = UMTVideoModel(config).eval(), torch.randn(1, 2, 3, 48, 48)
    choice = {"keep_ratio": 0.5, "token_selector": "teacher_saliency"}
    keep_tokens(model, KeptTokenArguments(**choice, teacher_name_or_path=str(folder)))
    own = load_choosing_teacher(str(folder), 3)
    assert (own.grid_size, own.image_size) == (3, 24)
    with torch.no_grad():
        expected = model(video, saliency=own.compute_saliency(video)).last_hidden_state
        assert torch.equal(model(video).last_hidden_state, expected)


@pytest.fixture
def complete(tmp_path) -> Path:
    """A SigLIP with its text tower."""
    torch.manual_seed(0)
    text = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {**WIDE, "vocab_size": 20, "max_position_embeddings": 8}
    config = SiglipConfig(text_config=text, vision_config={**SIZES, **WIDE})
    SiglipModel(config).save_pretrained(tmp_path / "complete")
    return tmp_path / "complete"


def test_a_complete_model_gives_its_tower_without_a_word_on_the_rest(complete, caplog):
    teacher = UMTTeacher.from_pretrained(str(complete), 2)
    assert "LOAD REPORT" not in caplog.text
    assert teachers.read_patch_size(str(complete)) == SIZES["patch_size"]
    own, video = SiglipModel.from_pretrained(complete).vision_model, torch.randn(1, 2, 3, 32, 32)
    torch.testing.assert_close(teacher(video).features, UMTTeacher(own, 2)(video).features)


def test_a_siglip_without_its_pooling_head_is_refused(tmp_path):
    build_tower("siglip", vision_use_head=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no pooling head"):
        UMTTeacher.from_pretrained(str(tmp_path), 2)


def test_pixels_are_those_that_the_folder_says(complete):
    video = torch.randn(1, 2, 3, 32, 32)
    before = UMTTeacher.from_pretrained(str(complete), 2)(video).features
    SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(complete)
    told = UMTTeacher.from_pretrained(str(complete), 2)(video).features
    own = SiglipModel.from_pretrained(complete).vision_model
    expected = UMTTeacher(own, 2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])(video).features
    torch.testing.assert_close(told, expected)
    assert (told - before).abs().max() > 1e-3
    processor = json.loads((complete / "preprocessor_config.json").read_text())
    (complete / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    plain = UMTTeacher(own, 2, image_mean=[0.0] * 3, image_std=[1.0] * 3)(video).features
    torch.testing.assert_close(UMTTeacher.from_pretrained(str(complete), 2)(video).features, plain)
    with pytest.raises(ValueError, match="three numbers each"):
        UMTTeacher(own, 2, image_mean=[0.5], image_std=[0.5])


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("siglip2", "NaFlex.* of fixed size"),
        ("dinov3_convnext", "no class token and no patches"),
        ("timm_wrapper", "a model of timm"),
        ("pe_video", "Perception Encoder.* in timm"),
        ("resnet", "must be a CLIP, MetaCLIP 2, SigLIP"),
        (None, "must be a CLIP, MetaCLIP 2, SigLIP"),
    ],
)
def test_what_cannot_teach_is_refused_by_name(model_type, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    with pytest.raises(ValueError, match=rf"type {model_type!r}.*{reason}"):
        UMTTeacher.from_pretrained(str(tmp_path))
    args = TeacherArguments(teacher_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"which the teacher must be: .*type {model_type!r}"):
        load_teacher(args, "sdpa", Accelerator(cpu=True))


def test_a_version_without_the_class_is_named(kind, folder, monkeypatch):
    """As an older Transformers would be, which has not heard of it."""
    _, model_class = teachers.find_class(str(folder))
    other = type("Older", (), {"__version__": "5.0.0"})
    monkeypatch.setattr(teachers, "transformers", other)
    with pytest.raises(
        ImportError, match=r"kind.* is of type '.*', which needs a newer Transformers .* 5\.0\.0".replace("kind", kind)
    ):
        UMTTeacher.from_pretrained(str(folder), 2)
    assert hasattr(transformers, model_class.__name__)
