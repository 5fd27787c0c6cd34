"""Nothing is done twice between the frames and the loss."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from umt_hf import (
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
)
from umt_hf.modeling import losses_umt, modeling_umt_video, modeling_umt_video_text
from umt_hf.modeling.losses_umt import uta_loss
from umt_hf.teachers import teacher as teachers
from umt_hf.teachers.teacher import UMTTeacher
from umt_hf.training.alignment import TokenGrid, compute_targets, count_visible, draw_visible_indices
from umt_hf.training.stage1 import Stage1
from umt_hf.training.stage2 import Stage2
from umt_hf.training.step.forward import name_losses

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 12,
}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "fusion_layer": 2,
    "encoder_width": 32,
}


class SortingCounter(TorchDispatchMode):
    """Counts the operations that order values."""

    def __init__(self, calls: Counter):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("topk", "sort", "argsort", "scatter_", "searchsorted"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each check and each normalisation runs."""
    counter = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            norm = kwargs.get("norm", args[1] if len(args) > 1 else "l2")
            if name != "normalize_features" or norm != "none":
                counter[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(modeling_umt_video.UMTVideoPatchEmbeddings, "compute_grid")
    count(modeling_umt_video, "resolve_visible_indices")
    for module in (modeling_umt_video, modeling_umt_video_text, losses_umt, teachers):
        count(module, "normalize_features")
    return counter


@pytest.fixture
def teacher() -> UMTTeacher:
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    return UMTTeacher(CLIPVisionModelWithProjection(config), num_aligned_layers=2)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32), "mask_noise": torch.empty(2, 64).exponential_()}


@pytest.mark.parametrize("mask_type", ["attention", "tube", "random"])
def test_one_step_of_stage_1(mask_type, calls, teacher, batch):
    model = UMTVideoForPreTraining(UMTVideoConfig(**VISION, mask_type=mask_type))
    stage = SimpleNamespace(
        model=model, teacher=teacher, other_teachers=(), config=model.config, compute_targets=compute_targets
    )
    with SortingCounter(calls):
        Stage1.forward_step(stage, batch)["uta_loss"].backward()
    # The indices are ordered once after the draw; the backward pass of the gathers does not order anything.
    drawing = {"topk": 1, "sort": 1} | ({} if mask_type == "attention" else {"searchsorted": 1})
    assert calls == {"compute_grid": 1, "resolve_visible_indices": 1, "normalize_features": 2} | drawing


def test_one_step_of_stage_2(calls, teacher, batch):
    config = UMTVideoTextConfig(
        vision_config=VISION, text_config=TEXT, projection_dim=16, mlm_loss_weight=0, vtm_loss_weight=0
    )
    model = UMTVideoTextForPreTraining(config)
    words = {
        "input_ids": torch.tensor([[101, 7, 8], [101, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    stage = SimpleNamespace(model=model, teacher=teacher, config=config, compute_targets=compute_targets)
    with SortingCounter(calls):
        Stage2.forward_step(stage, batch | words | {"pair_ids": None})
    features = {"student": 1, "teacher": 1}
    # Vectors of videos are of unit length; the public functions of the contrast take texts of any length.
    contrast = {"outputs": 1, "logits": 1, "vtc_loss": 1}
    assert calls["normalize_features"] == sum(features.values()) + sum(contrast.values())
    assert (calls["compute_grid"], calls["resolve_visible_indices"]) == (1, 1)
    assert (calls["topk"], calls["sort"], calls["argsort"]) == (1, 1, 0)


def test_detection_checks_a_clip_once(calls, batch):
    model = UMTVideoForActionDetection(UMTVideoConfig(**VISION))
    model(batch["pixel_values"], boxes=torch.tensor([[[0.0, 0, 8, 8]]] * 2))
    assert (calls["compute_grid"], calls["resolve_visible_indices"]) == (1, 1)


def test_loss_and_gradients_equal_those_of_the_public_loss(teacher, batch):
    """`uta_loss` normalises both sides by default, which changes unit vectors by rounding alone."""
    torch.manual_seed(0)
    model = UMTVideoForPreTraining(UMTVideoConfig(**VISION))
    stage = SimpleNamespace(
        model=model, teacher=teacher, other_teachers=(), config=model.config, compute_targets=compute_targets
    )
    loss = Stage1.forward_step(stage, batch)["uta_loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    visible, targets = compute_targets(teacher, batch["pixel_values"], batch["mask_noise"], "attention", 0.8)
    expected = uta_loss(model(batch["pixel_values"], visible_indices=visible).aligned_features, targets)
    torch.testing.assert_close(loss, expected, atol=1e-7, rtol=1e-7)
    for one, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("mask_type", ["attention", "tube", "random"])
def test_indices_have_the_counted_length(mask_type):
    grid = TokenGrid(4, 16)
    noise = torch.empty(2, 64).exponential_()
    visible = draw_visible_indices(mask_type, 0.8, torch.rand(8, 16), noise, grid)
    assert visible.shape == (2, count_visible(mask_type, 0.8, grid))
    # A clip's mask does not depend on the others of its batch.
    alone = draw_visible_indices(mask_type, 0.8, torch.ones(4, 16), noise[1:], grid)
    assert torch.equal(alone, draw_visible_indices(mask_type, 0.8, torch.ones(8, 16), noise, grid)[1:])


def test_losses_of_several_teachers_are_named_by_type():
    def name(*types: str) -> list[str]:
        towers = [SimpleNamespace(config=SimpleNamespace(model_type=model_type)) for model_type in types]
        return name_losses([SimpleNamespace(vision_tower=tower) for tower in towers])

    assert name("clip_vision_model", "vjepa2") == ["clip_uta_loss", "vjepa2_uta_loss"]
    assert name("dinov2", "videomae", "dinov2") == ["dinov2_1_uta_loss", "videomae_uta_loss", "dinov2_2_uta_loss"]
