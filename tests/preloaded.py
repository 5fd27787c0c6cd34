"""What `tests.processes` imports once for all ranks: the scripts, and what they import when they run."""

import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.nn  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoModel, AutoProcessor, AutoVideoProcessor, Trainer  # noqa: F401

import umt_hf.cli  # noqa: F401
from umt_hf.training import (  # noqa: F401
    evaluate_classification,
    evaluate_detection,
    evaluate_multiple_choice,
    evaluate_question_answering,
    evaluate_retrieval,
    features,
    finetune_classification,
    finetune_detection,
    finetune_question_answering,
    finetune_retrieval,
    stage1,
    stage2,
)
