"""Unmasked Teacher (UMT) video foundation models, native to Transformers.

Importing the package registers the models and the processor with Transformers' Auto classes. Heavy dependencies
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
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .modeling.configuration_umt_video import UMTVideoConfig
from .modeling.modeling_umt_video import (
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
)
from .processing.video_processing_umt_video import UMTVideoProcessor

if TYPE_CHECKING:
    from .modeling.teacher_umt_video import UMTTeacher

AutoConfig.register(UMTVideoConfig.model_type, UMTVideoConfig)
AutoModel.register(UMTVideoConfig, UMTVideoModel)
AutoModelForPreTraining.register(UMTVideoConfig, UMTVideoForPreTraining)
AutoModelForVideoClassification.register(UMTVideoConfig, UMTVideoForVideoClassification)
AutoVideoProcessor.register(UMTVideoConfig, UMTVideoProcessor)

__version__ = "0.1.0"
__all__ = [
    "UMTTeacher",
    "UMTVideoConfig",
    "UMTVideoForPreTraining",
    "UMTVideoForVideoClassification",
    "UMTVideoModel",
    "UMTVideoProcessor",
]


def __getattr__(name: str) -> Any:
    if name == "UMTTeacher":  # brings CLIP along, which only pre-training needs
        from .modeling.teacher_umt_video import UMTTeacher

        return UMTTeacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
