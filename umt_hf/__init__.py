"""Unmasked Teacher (UMT) video foundation models, native to Transformers.

Importing the package registers the models and processors with Transformers' Auto classes. Heavy dependencies
(decoders, datasets, PEFT) load when they are first used.

Source: Li et al., "Unmasked Teacher: Towards Training-Efficient Video Foundation Models", ICCV 2023
(arXiv 2303.16058).
"""

from typing import TYPE_CHECKING, Any

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
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
    from .teachers.clip import UMTTeacher

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
AutoVideoProcessor.register(UMTVideoTextConfig, UMTVideoProcessor)
AutoProcessor.register(UMTVideoTextConfig, UMTVideoTextProcessor)

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name == "UMTTeacher":  # brings CLIP along, which only pre-training needs
        from .teachers.clip import UMTTeacher

        return UMTTeacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
