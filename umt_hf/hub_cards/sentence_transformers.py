"""The three small files that make a folder one of sentence-transformers, which this package does not import.

Source: sentence-transformers, "modality_config" of its Transformer module (from 6.0 on).
"""

import json
from pathlib import Path
from typing import Any

from ..runs.disk import write_text
from ..runs.models import DUAL_ENCODERS, MODELS_BY_NAME
from .card import load_model_config

MODULES_FILE = "modules.json"
MODULE_CONFIG_FILE = "sentence_bert_config.json"
MODEL_CONFIG_FILE = "config_sentence_transformers.json"
FILES = (MODULES_FILE, MODULE_CONFIG_FILE, MODEL_CONFIG_FILE)
# Sentence-transformers loads its own modules alone without `trust_remote_code`.
MODULE = "sentence_transformers.base.modules.transformer.Transformer"
VECTOR = "pooler_output"


def build_files(model_class: str) -> dict[str, Any]:
    """Contents of the files for a model of a class; none where `AutoModel` would leave parts of it fresh.

    Args:
        model_class: As `config.json` names it.

    Returns:
        Name of a file -> content. Videos and texts of a dual encoder are compared by the inner product: a video's
        vector is the mean of unit vectors, and is not made a unit vector once more.
    """
    if model_class in DUAL_ENCODERS:
        methods, similarity = {"text": "get_text_embedding", "video": "get_video_features"}, "dot"
    elif MODELS_BY_NAME[model_class].model_type == "umt_video":
        methods, similarity = {"video": "forward"}, "cosine"
    else:
        return {}
    config = {kind: {"method": method, "method_output_name": VECTOR} for kind, method in methods.items()}
    return {
        MODULES_FILE: [{"idx": 0, "name": "0", "path": "", "type": MODULE}],
        MODULE_CONFIG_FILE: {
            "transformer_task": "feature-extraction",
            "module_output_name": "sentence_embedding",
            "modality_config": config,
        },
        MODEL_CONFIG_FILE: {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": similarity,
            "prompts": {},
            "default_prompt_name": None,
        },
    }


def write_sentence_transformers_files(folder: str | Path, model_class: str | None = None) -> None:
    """Write the files beside a model.

    Args:
        folder: Of the model, with its processor.
        model_class: As `config.json` names it; default: that of the folder's.

    Raises:
        ValueError: If the folder holds none of our models.
    """
    folder = Path(folder)
    model_class = model_class or load_model_config(folder)[1]
    for name, content in build_files(model_class).items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
