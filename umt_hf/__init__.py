"""Unmasked Teacher (UMT) video foundation models, native to Transformers.

Importing the package registers the models and processors with Transformers' Auto classes. Heavy dependencies
(decoders, datasets, PEFT) load when they are first used.

Source: Li et al., "Unmasked Teacher: Towards Training-Efficient Video Foundation Models", ICCV 2023
(arXiv 2303.16058).
"""

import importlib
from typing import TYPE_CHECKING, Any

from .runs import noise as _noise  # noqa: F401  first: what libraries remark when Transformers imports them

# isort: split
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
)
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .modeling.configuration_umt_video import UMTVideoConfig
from .modeling.configuration_umt_video_text import UMTTextConfig, UMTVideoTextConfig
from .modeling.modeling_umt_text import UMTTextLMHeadModel, UMTTextModel
from .modeling.modeling_umt_video import (
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
)
from .modeling.modeling_umt_video_text import (
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)
from .processing.processing_umt_video_text import UMTVideoTextProcessor
from .processing.video_processing_umt_video import UMTVideoProcessor
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .inference.batches import VideoEmbedder
    from .inference.classification import VideoClassifier
    from .inference.detection import ActionDetector
    from .inference.export import ExportedVideoModel
    from .inference.labels.zero_shot import ZeroShotVideoClassifier
    from .inference.question_answering import VideoAnswerer
    from .inference.search import VideoSearcher, embed_videos
    from .teachers.teacher import UMTTeacher

# Imported when they are first used, since they bring CLIP, Accelerate or `datasets` along.
LAZY_NAMES = {
    "ActionDetector": "inference.detection",
    "ExportedVideoModel": "inference.export",
    "UMTTeacher": "teachers.teacher",
    "VideoAnswerer": "inference.question_answering",
    "VideoClassifier": "inference.classification",
    "VideoEmbedder": "inference.batches",
    "VideoSearcher": "inference.search",
    "ZeroShotVideoClassifier": "inference.labels.zero_shot",
    "embed_videos": "inference.search",
}

# From here on Auto classes, pipelines and `Trainer` load UMT folders by name.
AutoConfig.register(UMTVideoConfig.model_type, UMTVideoConfig)
AutoModel.register(UMTVideoConfig, UMTVideoModel)
AutoModelForPreTraining.register(UMTVideoConfig, UMTVideoForPreTraining)
AutoModelForVideoClassification.register(UMTVideoConfig, UMTVideoForVideoClassification)
AutoVideoProcessor.register(UMTVideoConfig, UMTVideoProcessor)

AutoConfig.register(UMTTextConfig.model_type, UMTTextConfig)
AutoModel.register(UMTTextConfig, UMTTextModel)
AutoConfig.register(UMTVideoTextConfig.model_type, UMTVideoTextConfig)
AutoModel.register(UMTVideoTextConfig, UMTVideoTextModel)
AutoModelForPreTraining.register(UMTVideoTextConfig, UMTVideoTextForPreTraining)
AutoModelForVisualQuestionAnswering.register(UMTVideoTextConfig, UMTVideoTextForQuestionAnswering)
AutoModelForZeroShotImageClassification.register(UMTVideoTextConfig, UMTVideoTextModel)
AutoVideoProcessor.register(UMTVideoTextConfig, UMTVideoProcessor)
AutoProcessor.register(UMTVideoTextConfig, UMTVideoTextProcessor)

# Folders of the other kind, past `register`, which wants a class of that very configuration: a classifier takes the
# video encoder of a folder with text, and classes with text say which class a folder without one needs.
OTHER_KIND: tuple[tuple[Any, type, type], ...] = (
    (MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING, UMTVideoTextConfig, UMTVideoForVideoClassification),
    (MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING, UMTVideoConfig, UMTVideoTextForQuestionAnswering),
    (MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING, UMTVideoConfig, UMTVideoTextModel),
)
for _mapping, _config_class, _model_class in OTHER_KIND:
    _mapping.register(_config_class, _model_class)

__all__ = [
    "ActionDetector",
    "ExportedVideoModel",
    "UMTTeacher",
    "UMTTextConfig",
    "UMTTextLMHeadModel",
    "UMTTextModel",
    "UMTVideoConfig",
    "UMTVideoForActionDetection",
    "UMTVideoForPreTraining",
    "UMTVideoForVideoClassification",
    "UMTVideoModel",
    "UMTVideoProcessor",
    "UMTVideoTextConfig",
    "UMTVideoTextForPreTraining",
    "UMTVideoTextForQuestionAnswering",
    "UMTVideoTextForRetrieval",
    "UMTVideoTextModel",
    "UMTVideoTextProcessor",
    "VideoAnswerer",
    "VideoClassifier",
    "VideoEmbedder",
    "VideoSearcher",
    "ZeroShotVideoClassifier",
    "embed_videos",
]


def __getattr__(name: str) -> Any:
    if name in LAZY_NAMES:
        return getattr(importlib.import_module(f".{LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
