"""Transformers' ModelTesterMixin and ConfigTester on the text tower and the video-text models."""

import unittest
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from umt_hf import (
    UMTTextConfig,
    UMTTextLMHeadModel,
    UMTTextModel,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

from .transformers_sdist import import_common_tests

configuration_tests = import_common_tests("test_configuration_common")
modeling_tests = import_common_tests("test_modeling_common")

CLASS_NAMES = {
    "MODEL_MAPPING_NAMES": {"umt_text": "UMTTextModel", "umt_video_text": "UMTVideoTextModel"},
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": {"umt_video_text": "UMTVideoTextForPreTraining"},
}


@pytest.fixture(autouse=True)
def list_video_text_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter these classes in Transformers' tables of names for the time of one test."""
    for table, names in CLASS_NAMES.items():
        for model_type, class_name in names.items():
            monkeypatch.setitem(getattr(modeling_auto, table), model_type, class_name)


class UMTTextModelTester:
    """A tiny text tower and inputs for it, in the terms of the common tests."""

    batch_size = 3
    seq_length = 7
    vocab_size = 120
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_attended = 5
    is_training = True

    def __init__(self, is_decoder: bool = False):
        self.is_decoder = is_decoder

    def get_config(self) -> UMTTextConfig:
        return UMTTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            max_position_embeddings=20,
            # The common tests run the text mode of the tower, so all its layers are text layers there.
            fusion_layer=0 if self.is_decoder else self.num_hidden_layers,
            encoder_width=self.hidden_size,
            is_decoder=self.is_decoder,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[UMTTextConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": modeling_tests.ids_tensor(shape, self.vocab_size),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        if self.is_decoder:
            inputs["encoder_hidden_states"] = modeling_tests.floats_tensor(
                [self.batch_size, self.num_attended, self.hidden_size]
            )
        return self.get_config(), inputs


class UMTTextModelTest(modeling_tests.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UMTTextModel,)

    def setUp(self) -> None:
        self.model_tester = UMTTextModelTester()

    def test_config(self) -> None:
        tester = configuration_tests.ConfigTester(self, config_class=UMTTextConfig, hidden_size=36)
        tester.run_common_tests()


class UMTTextLMHeadModelTest(modeling_tests.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UMTTextLMHeadModel,)
    additional_model_inputs = ["encoder_hidden_states"]

    def setUp(self) -> None:
        self.model_tester = UMTTextModelTester(is_decoder=True)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | ({"labels": inputs["input_ids"].clone()} if return_labels else {})

    @unittest.skip("The tests of generation are not distributed; tests/unit has ours.")
    def test_generation_tester_mixin_inheritance(self) -> None:
        pass


class UMTVideoTextModelTester:
    """A tiny model with both towers and inputs for it, in the terms of the common tests."""

    batch_size = 4
    seq_length = 7
    num_frames = 2
    image_size = 16
    patch_size = 8
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def get_config(self) -> UMTVideoTextConfig:
        return UMTVideoTextConfig(
            vision_config={
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "num_frames": self.num_frames,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 40,
                "num_aligned_layers": 2,
                "teacher_hidden_size": 12,
            },
            text_config={
                "vocab_size": 120,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 40,
                "max_position_embeddings": 20,
                "fusion_layer": 1,
                "encoder_width": self.hidden_size,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            projection_dim=16,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[UMTVideoTextConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        video = [self.batch_size, self.num_frames, 3, self.image_size, self.image_size]
        inputs = {
            "input_ids": modeling_tests.ids_tensor(shape, 120),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "pixel_values": modeling_tests.floats_tensor(video),
        }
        return self.get_config(), inputs

    def get_training_inputs(self, inputs: dict[str, torch.Tensor], model_class: type) -> dict[str, Any]:
        """What makes a class compute its losses, with all draws given, so that they are the same every time."""
        input_ids = inputs["input_ids"]
        others = torch.arange(self.batch_size, device=input_ids.device).roll(1)
        draws = {"return_loss": True}
        if model_class is not UMTVideoTextModel:
            draws |= {"video_negatives": others, "text_negatives": others}
        if model_class is UMTVideoTextForPreTraining:
            draws |= {"mlm_input_ids": input_ids.clone(), "mlm_labels": input_ids.clone()}
            num_tokens = self.num_frames * (self.image_size // self.patch_size) ** 2
            draws["teacher_features"] = torch.ones(2, self.batch_size, num_tokens, 12, device=input_ids.device)
        return draws


class UMTVideoTextModelTest(modeling_tests.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UMTVideoTextModel, UMTVideoTextForRetrieval, UMTVideoTextForPreTraining)
    additional_model_inputs = ["input_ids", "pixel_values"]
    has_attentions = False  # they are in the outputs of the towers

    def setUp(self) -> None:
        self.model_tester = UMTVideoTextModelTester()

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs |= self.model_tester.get_training_inputs(inputs, model_class)
        return inputs

    def _video_features_prepare_config_and_inputs(self) -> tuple[UMTVideoTextConfig, dict[str, torch.Tensor]]:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"pixel_values": inputs["pixel_values"]}

    def _text_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return self.model_tester.get_config().text_config.fusion_layer

    @unittest.skip("Hidden states are in the outputs of the towers, as in CLIP.")
    def test_hidden_states_output(self) -> None:
        pass

    @unittest.skip("Hidden states are in the outputs of the towers, as in CLIP.")
    def test_retain_grad_hidden_states_attentions(self) -> None:
        pass

    def test_config(self) -> None:
        tester = configuration_tests.ConfigTester(
            self, config_class=UMTVideoTextConfig, has_text_modality=False, common_properties=["projection_dim"]
        )
        tester.run_common_tests()


class UMTVideoTextForQuestionAnsweringTester(UMTVideoTextModelTester):
    """The same with answers for the decoder, which are longer than the questions."""

    batch_size = 7  # the common tests fill a smaller batch up with random ids, padding among them
    num_hidden_states_types = 2  # of the questions and of the answers
    decoder_seq_length = 9

    def prepare_config_and_inputs_for_common(self) -> tuple[UMTVideoTextConfig, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        shape = [self.batch_size, self.decoder_seq_length]
        inputs["decoder_input_ids"] = modeling_tests.ids_tensor(shape, 119) + 1  # without padding, as answers begin
        inputs["decoder_attention_mask"] = torch.ones(shape, dtype=torch.long)
        return config, inputs


class UMTVideoTextForQuestionAnsweringTest(modeling_tests.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UMTVideoTextForQuestionAnswering,)
    # What Transformers asks of a model whose `generate` is not the mixin's: ours calls that of the answer decoder.
    all_generative_model_classes = ()
    additional_model_inputs = ["input_ids", "pixel_values", "decoder_input_ids"]

    def setUp(self) -> None:
        self.model_tester = UMTVideoTextForQuestionAnsweringTester()

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | ({"labels": inputs["decoder_input_ids"].clone()} if return_labels else {})
