"""Transformers' ModelTesterMixin, TrainingTesterMixin and ConfigTester on the video models.

`seq_length` is the number of tokens that a model's layers see, so the pre-training model, which sees the visible
tokens alone, has a separate test class.
"""

import unittest
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from umt_hf import (
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
)

from .transformers_sdist import import_common_tests

configuration_tests = import_common_tests("test_configuration_common")
modeling_tests = import_common_tests("test_modeling_common")
training_tests = import_common_tests("test_training_mixin")


class UMTVideoModelTester:
    """A tiny configuration and inputs for it, in the terms of the common tests."""

    batch_size = 3
    num_frames = 2
    image_size = 8
    patch_size = 2
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    teacher_hidden_size = 16
    is_training = True
    mask_length = num_frames * (image_size // patch_size) ** 2  # all tokens of a clip
    num_masks = 24
    seq_length = mask_length
    sequence_classification_class = UMTVideoForVideoClassification  # what the training test trains
    # The classifier with the pooling that has weights; the mean is a part of what every model computes.
    optional_parts: dict[str, Any] = {"pooling_type": "attentive"}

    def get_config(self) -> UMTVideoConfig:
        return UMTVideoConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_frames=self.num_frames,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            position_embedding_frames=self.num_frames,
            position_embedding_image_size=self.image_size,
            num_aligned_layers=self.num_hidden_layers,
            teacher_hidden_size=self.teacher_hidden_size,
            vocab_size=1,  # read by the training test, for text
            **self.optional_parts,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[UMTVideoConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.num_frames, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling_tests.floats_tensor(shape)}


class UMTVideoForPreTrainingTester(UMTVideoModelTester):
    """The same for a model whose layers see the visible tokens alone, with every optional parameter."""

    seq_length = UMTVideoModelTester.mask_length - UMTVideoModelTester.num_masks
    sequence_classification_class = None
    optional_parts = {"layer_scale_init_value": 0.1, "learnable_position_embedding": True}

    def sample_pretraining_inputs(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Visible tokens at places of their own in every row, and a teacher's features there.

        The features are equal all over a clip, so that the training test can ask a tiny model to reach them.
        """
        generator = torch.Generator().manual_seed(0)
        ranking = torch.rand(batch_size, self.mask_length, generator=generator).argsort(dim=1)
        features = torch.randn(self.num_hidden_layers, batch_size, 1, self.teacher_hidden_size, generator=generator)
        return {
            "visible_indices": ranking[:, : self.seq_length].sort(dim=1).values,
            "teacher_features": F.normalize(features, dim=-1).expand(-1, -1, self.seq_length, -1),
        }


class CommonTests(modeling_tests.ModelTesterMixin, training_tests.TrainingTesterMixin):
    """What both test classes share."""

    model_tester_class = UMTVideoModelTester
    test_resize_embeddings = False  # as VideoMAE's own tests: there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # never excused by age
    training_overfit_learning_rate = 3e-3  # ends the training test's 300 steps well below its thresholds

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class()

    def test_model_get_set_embeddings(self) -> None:
        """As the common test, but a video enters through a patch embedding, not through `nn.Embedding`."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            replacement = nn.Linear(10, 10)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())

    def _get_model_modality(self) -> str:
        """The training test knows batches of text alone; `_create_text_training_batch` fills one with video."""
        return "text"

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, Any]:
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = {name: values[:batch_size] for name, values in inputs.items()}
        batch = self._prepare_for_class(inputs, self._get_trainable_model_class(), return_labels=True)
        if "labels" in batch and batch["labels"].ndim == 1:
            batch["labels"] = torch.arange(batch_size)
        return batch


class UMTVideoModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (UMTVideoModel, UMTVideoForVideoClassification)

    def test_config(self) -> None:
        tester = configuration_tests.ConfigTester(
            self, config_class=UMTVideoConfig, has_text_modality=False, hidden_size=36
        )
        tester.run_common_tests()


class UMTVideoForPreTrainingTest(CommonTests, unittest.TestCase):
    model_tester_class = UMTVideoForPreTrainingTester
    all_model_classes = (UMTVideoForPreTraining,)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        more = self.model_tester.sample_pretraining_inputs(inputs["pixel_values"].shape[0])
        if not return_labels:
            del more["teacher_features"]
        if "bool_masked_pos" in inputs:  # set by the tests that compare attention implementations
            del more["visible_indices"]
        return inputs | {name: value.to(inputs["pixel_values"].device) for name, value in more.items()}


class UMTVideoForActionDetectionTester(UMTVideoModelTester):
    """The same with boxes, one of which is padding."""

    sequence_classification_class = None
    num_boxes = 3

    def prepare_config_and_inputs_for_common(self) -> tuple[UMTVideoConfig, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        corners = modeling_tests.floats_tensor([self.batch_size, self.num_boxes, 2, 2], scale=self.image_size / 2)
        boxes = torch.cat([corners[:, :, 0], corners.sum(dim=2)], dim=-1)
        mask = torch.ones(self.batch_size, self.num_boxes, dtype=torch.bool, device=boxes.device)
        mask[0, -1] = False
        return config, {**inputs, "boxes": boxes, "boxes_mask": mask}


class UMTVideoForActionDetectionTest(CommonTests, unittest.TestCase):
    model_tester_class = UMTVideoForActionDetectionTester
    all_model_classes = (UMTVideoForActionDetection,)
    additional_model_inputs = ["boxes"]

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            boxes = inputs["boxes"]
            inputs["labels"] = F.one_hot(torch.arange(boxes.shape[1], device=boxes.device) % 2, 2).expand(
                len(boxes), -1, -1
            )
        return inputs
