"""Unmasked Teacher (UMT) video foundation models, native to Transformers.

Importing the package registers the models with Transformers' Auto classes. Heavy dependencies (decoders, datasets,
PEFT) load when they are first used.

Source: Li et al., "Unmasked Teacher: Towards Training-Efficient Video Foundation Models", ICCV 2023
(arXiv 2303.16058).
"""

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
)

from .modeling.configuration_umt_video import UMTVideoConfig
from .modeling.modeling_umt_video import (
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
)

AutoConfig.register(UMTVideoConfig.model_type, UMTVideoConfig)
AutoModel.register(UMTVideoConfig, UMTVideoModel)
AutoModelForPreTraining.register(UMTVideoConfig, UMTVideoForPreTraining)
AutoModelForVideoClassification.register(UMTVideoConfig, UMTVideoForVideoClassification)

__version__ = "0.1.0"
