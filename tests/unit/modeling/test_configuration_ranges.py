"""Every field of the configurations that has a range is refused outside it, by its name."""

import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from umt_hf import UMTTextConfig, UMTVideoConfig, UMTVideoTextConfig
from umt_hf.modeling.configuration_umt_video import SIZES

NAN = float("nan")
SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "mask_ratio", "image_mask_ratio")
TEXT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEXT_SIZES += ("max_position_embeddings", "type_vocab_size", "encoder_width")
WEIGHTS = ("uta_loss_weight", "vtc_loss_weight", "vtm_loss_weight", "mlm_loss_weight")
# Class, field, values that are refused, what the sentence says.
CASES = [
    *((UMTVideoConfig, name, (0, -8), f"{name} must be 1 or more, got ") for name in SIZES),
    *((UMTVideoConfig, name, (-0.1, 1.0, NAN), f"{name} must be in [0, 1), got ") for name in SHARES),
    *(
        (UMTVideoConfig, name, (0, -1.0, NAN, float("inf")), f"{name} must be above 0, got ")
        for name in ("layer_norm_eps", "alignment_norm_eps", "alignment_interval")
    ),
    *(
        (UMTVideoConfig, name, (-1.0, NAN), f"{name} must be 0 or more, got ")
        for name in ("initializer_range", "layer_scale_init_value")
    ),
    (UMTVideoConfig, "keep_ratio", (0, -0.5, 1.5, NAN), "keep_ratio must be above 0 and at most 1, got "),
    (UMTVideoConfig, "token_selector", ("loudness",), "token_selector"),
    (UMTVideoConfig, "token_selector_seed", (-1,), "token_selector_seed must be 0 or more, got "),
    (UMTVideoConfig, "num_attention_heads", (7,), "hidden_size=768 is not a multiple of num_attention_heads=7"),
    (UMTVideoConfig, "patch_size", (15,), "image_size=224 is not a multiple of patch_size=15"),
    (UMTVideoConfig, "tubelet_size", (3,), "num_frames=8 is not a multiple of tubelet_size=3"),
    (UMTVideoConfig, "position_embedding_frames", (None,), "both"),
    (UMTVideoConfig, "position_embedding_image_size", (100,), "are not multiples of"),
    (UMTVideoConfig, "pooling_type", ("max",), "pooling_type"),
    (UMTVideoConfig, "mask_type", ("block",), "mask_type"),
    (UMTVideoConfig, "alignment_norm", ("l1",), "alignment_norm"),
    (UMTVideoConfig, "alignment_loss", ("l1",), "alignment_loss"),
    (UMTVideoConfig, "other_teachers", ([{"image_size": 224}],), "need hidden_size, image_size, name_or_path each"),
    (UMTVideoConfig, "teacher_weights", ([1.0, 0.5],), "has 2 values and there are 1 teachers: give one for each"),
    (UMTVideoConfig, "teacher_weights", ([0.0], [NAN]), "teacher_weights must be positive"),
    (UMTVideoConfig, "hidden_size", ("wide", 1.5), "hidden_size"),
    *((UMTTextConfig, name, (0, -8), f"{name} must be 1 or more, got ") for name in TEXT_SIZES),
    *((UMTTextConfig, name, (-0.1, 1.0, NAN), f"{name} must be in [0, 1), got ") for name in SHARES[:2]),
    (UMTTextConfig, "layer_norm_eps", (0, -1.0, NAN), "layer_norm_eps must be above 0, got "),
    (UMTTextConfig, "initializer_range", (-1.0, NAN), "initializer_range must be 0 or more, got "),
    *(
        (UMTTextConfig, name, (-1,), f"{name} must be 0 or more, got ")
        for name in ("bos_token_id", "eos_token_id", "mask_token_id")
    ),
    (UMTTextConfig, "pad_token_id", (-1, 30522), "must be in [0, vocab_size=30522)"),
    (UMTTextConfig, "fusion_layer", (13, -1), "must be in [0, num_hidden_layers=12]"),
    (UMTTextConfig, "num_attention_heads", (7,), "hidden_size=768 is not a multiple of num_attention_heads=7"),
    (UMTVideoTextConfig, "projection_dim", (0, -1), "projection_dim must be 1 or more, got "),
    *((UMTVideoTextConfig, name, (-1.0, NAN), f"{name} must be 0 or more, got ") for name in WEIGHTS),
    (UMTVideoTextConfig, "initializer_range", (-1.0, NAN), "initializer_range must be 0 or more, got "),
    (UMTVideoTextConfig, "mlm_probability", (0.0, 1.0, NAN), "mlm_probability must be in (0, 1), got "),
    (UMTVideoTextConfig, "temperature_init_value", (0.0, 0.6, NAN), "must be within temperature_bounds"),
    (UMTVideoTextConfig, "temperature_bounds", ((0.1,), (0.1, 0.2, 0.3)), "are a lower and an upper limit"),
    (UMTVideoTextConfig, "temperature_bounds", ((0.0, 0.5), (0.5, 0.1)), "must be within temperature_bounds"),
    (UMTVideoTextConfig, "vision_config", ({"patch_size": 0},), "patch_size must be 1 or more, got 0"),
    (UMTVideoTextConfig, "text_config", ({"encoder_width": 5},), "encoder_width=5 must be vision_config.hidden_size"),
]


@pytest.mark.parametrize("config_class, name, values, sentence", CASES)
def test_values_outside_their_range_are_named(config_class, name, values, sentence):
    for value in values:
        with pytest.raises(StrictDataclassError, match=re.escape(sentence)):
            config_class(**{name: value})


def test_every_field_with_a_range_is_tested():
    free = {"num_labels", "hidden_act", "qv_bias", "use_final_norm", "learnable_position_embedding", "is_decoder"}
    free |= {"teacher_name_or_path", "use_cache", "tie_word_embeddings", "vtm_hard_negatives", "pool_per_frame"}
    free |= {"contrastive_gather", "id2label", "label2id"}
    for config_class in (UMTVideoConfig, UMTTextConfig, UMTVideoTextConfig):
        own = set(config_class.__annotations__) - {"model_type"}
        tested = {name for found, name, _, _ in CASES if found is config_class}
        assert own - tested - free == set()
