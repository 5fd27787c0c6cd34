"""What `tests.processes` imports once for all ranks: the scripts, and what these import when they run."""

import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.nn  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoModel, AutoProcessor, AutoVideoProcessor, Trainer  # noqa: F401

import umt_hf.cli  # noqa: F401
import umt_hf.evaluation.classification
import umt_hf.evaluation.detection
import umt_hf.evaluation.multiple_choice
import umt_hf.evaluation.question_answering
import umt_hf.evaluation.retrieval
import umt_hf.finetuning.classification
import umt_hf.finetuning.detection
import umt_hf.finetuning.question_answering
import umt_hf.finetuning.retrieval
import umt_hf.inference.features
import umt_hf.inference.search
import umt_hf.training.stage1
import umt_hf.training.stage2  # noqa: F401
