"""Every Auto class of ours on every folder of ours: the class it loads and what starts fresh, or the error's words."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    pipeline,
)
from transformers.models.auto import modeling_auto

import umt_hf
from tests.unit.modeling.test_modeling_video_text import TINY, TINY_VISION
from umt_hf.runs.models import MODEL_CLASSES

FOLDERS = [row.name for row in MODEL_CLASSES]
WITH_TEXT = [row.name for row in MODEL_CLASSES if row.model_type == "umt_video_text"]
LABELS = {0: "rolling", 1: "falling", 2: "rising"}

# Auto class -> folder -> parts that start fresh. Where an Auto class of a head with text meets a folder without text,
# the error names the folder's class.
NOTHING: set[str] = set()
CLASSIFIER = {"classifier"}
DUAL_ENCODER = {"temperature", "text_projection", "video_norm", "video_projection"}
MATRIX = {
    AutoModel: {
        "UMTVideoModel": NOTHING,
        "UMTVideoForPreTraining": NOTHING,
        "UMTVideoForVideoClassification": NOTHING,
        "UMTVideoForActionDetection": NOTHING,
        "UMTVideoTextModel": NOTHING,
        "UMTVideoTextForPreTraining": NOTHING,
        "UMTVideoTextForRetrieval": NOTHING,
        "UMTVideoTextForQuestionAnswering": DUAL_ENCODER,
    },
    AutoModelForPreTraining: {
        "UMTVideoModel": {"alignment_heads"},
        "UMTVideoForPreTraining": NOTHING,
        "UMTVideoForVideoClassification": {"alignment_heads"},
        "UMTVideoForActionDetection": {"alignment_heads"},
        "UMTVideoTextModel": {"alignment_heads", "matching_head", "mlm_head"},
        "UMTVideoTextForPreTraining": NOTHING,
        "UMTVideoTextForRetrieval": {"alignment_heads", "mlm_head"},
        "UMTVideoTextForQuestionAnswering": DUAL_ENCODER | {"alignment_heads", "matching_head", "mlm_head"},
    },
    AutoModelForVideoClassification: {
        **dict.fromkeys(FOLDERS, CLASSIFIER | {"fc_norm"}),
        "UMTVideoForVideoClassification": NOTHING,
        "UMTVideoForActionDetection": {"fc_norm"},
    },
    AutoModelForVisualQuestionAnswering: {
        **dict.fromkeys(WITH_TEXT, {"answer_decoder"}),
        "UMTVideoTextForQuestionAnswering": NOTHING,
    },
    AutoModelForZeroShotImageClassification: {
        **dict.fromkeys(WITH_TEXT, NOTHING),
        "UMTVideoTextForQuestionAnswering": DUAL_ENCODER,
    },
}
CLASSES = {
    AutoModel: ("UMTVideoModel", "UMTVideoTextModel"),
    AutoModelForPreTraining: ("UMTVideoForPreTraining", "UMTVideoTextForPreTraining"),
    AutoModelForVideoClassification: ("UMTVideoForVideoClassification", "UMTVideoForVideoClassification"),
    AutoModelForVisualQuestionAnswering: (None, "UMTVideoTextForQuestionAnswering"),
    AutoModelForZeroShotImageClassification: (None, "UMTVideoTextModel"),
}
CELLS = [(auto_class, folder) for auto_class in MATRIX for folder in FOLDERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder per model class, with weights unlike any fresh ones."""
    root, found = tmp_path_factory.mktemp("folders"), {}
    for row in MODEL_CLASSES:
        torch.manual_seed(0)
        if row.name in WITH_TEXT:
            config = umt_hf.UMTVideoTextConfig(**TINY)
        else:
            config = umt_hf.UMTVideoConfig(**TINY_VISION, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
        model = getattr(umt_hf, row.name)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(root / row.name)
        found[row.name] = root / row.name
    return found


def list_auto_classes() -> set[str]:
    """Auto classes of Transformers that know a configuration of ours."""
    configs = (umt_hf.UMTVideoConfig, umt_hf.UMTVideoTextConfig)
    found = set()
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and any(config in mapping for config in configs):
            found.add(name)
    return found


def test_the_matrix_has_every_auto_class_and_folder():
    assert list_auto_classes() == {auto_class.__name__ for auto_class in MATRIX}
    for auto_class, (without_text, _) in CLASSES.items():
        assert list(MATRIX[auto_class]) == (FOLDERS if without_text else WITH_TEXT)


@pytest.mark.parametrize("auto_class,folder", CELLS, ids=[f"{a.__name__}-{f}" for a, f in CELLS])
def test_each_auto_class_on_each_folder(folders, auto_class, folder):
    name = CLASSES[auto_class][folder in WITH_TEXT]
    path = folders[folder]
    if name is None:
        for load in (
            auto_class.from_pretrained,
            lambda path: auto_class.from_config(AutoConfig.from_pretrained(path)),
        ):
            with pytest.raises(ValueError, match=rf"'umt_video', without text: load it with {folder}\.$"):
                load(path)
        return
    model, info = auto_class.from_pretrained(path, output_loading_info=True)
    assert type(model).__name__ == name
    assert {key.split(".")[0] for key in info["missing_keys"]} == MATRIX[auto_class][folder]
    assert not info["mismatched_keys"]
    # The encoder is the folder's to the last bit.
    encoder = umt_hf.UMTVideoModel.from_pretrained(path).state_dict()
    for key, tensor in model.state_dict().items():
        part, _, rest = key.partition(".")
        if name == "UMTVideoModel" or part == "vision_model":
            rest = key if name == "UMTVideoModel" else rest
            assert torch.equal(tensor, encoder[rest]), key
    fresh = auto_class.from_config(AutoConfig.from_pretrained(path))
    assert type(fresh) is type(model)
    model.save_pretrained(path.parent / "again")
    again, info = type(model).from_pretrained(path.parent / "again", output_loading_info=True)
    assert not info["missing_keys"] and type(again.config) is type(model.config)


@pytest.mark.parametrize("folder", WITH_TEXT)
def test_a_classifier_of_a_folder_with_text_takes_labels_and_fields(folders, folder):
    """Auto classes put options on the folder's configuration, or leave them over; both reach the encoder's part."""
    clip = torch.randn(1, 4, 3, 32, 32)
    options = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, "drop_path_rate": 0.1}
    options |= {"pooling_type": "attentive", "dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = AutoModelForVideoClassification.from_pretrained(folders[folder], **options)
    direct = umt_hf.UMTVideoForVideoClassification.from_pretrained(folders[folder], **options)
    for loaded in (model, direct):
        assert loaded.config.id2label == LABELS and loaded.config.num_labels == loaded.classifier.out_features == 3
        assert loaded.config.drop_path_rate == 0.1 and loaded.config.pooling_type == "attentive"
        assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"
        assert loaded(clip.to(torch.bfloat16)).logits.shape == (1, 3)
    assert AutoModelForVideoClassification.from_pretrained(folders[folder], num_labels=5).config.num_labels == 5
    config = AutoConfig.from_pretrained(folders[folder])
    encoder = umt_hf.UMTVideoModel.from_pretrained(folders[folder], config=config)
    expected = umt_hf.UMTVideoModel.from_pretrained(folders[folder])
    assert torch.equal(encoder(clip).pooler_output, expected(clip).pooler_output)
    assert type(config) is umt_hf.UMTVideoTextConfig and config.vision_config.drop_path_rate == 0


def test_a_pipeline_takes_a_folder_with_text(folders):
    processor = umt_hf.UMTVideoProcessor(
        num_frames=2, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    path = folders["UMTVideoTextForPreTraining"]
    # An older pipeline knows image processors only.
    name = "video_processor" if "video_processor" in inspect.signature(pipeline).parameters else "image_processor"
    classifier = pipeline("video-classification", model=str(path), **{name: processor})
    assert type(classifier.model) is umt_hf.UMTVideoForVideoClassification


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForImageTextToText])
def test_auto_classes_that_are_not_ours_say_so(folders, auto_class, folder):
    """Words of stage 2 are predicted beside a video, as `mlm_logits`, not as AutoModelForMaskedLM promises."""
    with pytest.raises(ValueError, match=rf"UMTVideo(Text)?Config.* {auto_class.__name__}"):
        auto_class.from_pretrained(folders[folder])


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_class_with_text_refuses_a_configuration_without(name):
    with pytest.raises(ValueError, match=f"{name} needs a configuration of type 'umt_video_text'.*class of its kind"):
        getattr(umt_hf, name)(umt_hf.UMTVideoConfig(**TINY_VISION))
