"""What `tests.processes` imports once for all ranks: the scripts, and what these import when they run."""

import datasets
import matplotlib.figure
import peft
import pytest
import torch.distributed.nn
import torch.utils.tensorboard
import transformers

import umt_hf.cli
import umt_hf.evaluation.classification
import umt_hf.evaluation.detection
import umt_hf.evaluation.moments
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
import umt_hf.training.stage2

IMPORTED = (datasets, matplotlib, peft, pytest, torch, umt_hf)
LAZY = (transformers.AutoModel, transformers.AutoProcessor, transformers.AutoVideoProcessor, transformers.Trainer)
