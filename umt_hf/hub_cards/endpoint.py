"""The `handler.py` of a pushed model, which Inference Endpoints call, and what it needs installed."""

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..runs.models import MODELS_BY_NAME
from .card import load_model_config

HANDLER_FILE, REQUIREMENTS_FILE = "handler.py", "requirements.txt"
TEMPLATE = "handler.py.jinja"
KINDS = ("classifier", "retriever", "answerer", "encoder")
REQUIREMENTS = (
    "torch>=2.6", "torchvision>=0.21", "transformers>=5.4", "huggingface_hub>=1.5", "safetensors>=0.4.3",
    "av>=17.1", "numpy>=2.0", "pillow>=10.1",
)  # fmt: skip


def build_handler(folder: Path) -> dict[str, bytes]:
    """The files that make an endpoint of a model folder.

    Args:
        folder: Model folder.

    Returns:
        Path in the repository -> content.

    Raises:
        ValueError: If the model is a detector, which needs boxes of persons, or none of ours.
    """
    _, model_class = load_model_config(folder)
    kind = MODELS_BY_NAME[model_class].usage
    if kind not in KINDS:
        raise ValueError(f"{folder}: there is no handler of a {model_class}, which needs boxes. Leave out --handler.")
    template = (resources.files("umt_hf.hub_cards") / "templates" / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return {
        HANDLER_FILE: environment.from_string(template).render(kind=kind).encode(),
        REQUIREMENTS_FILE: "".join(f"{line}\n" for line in REQUIREMENTS).encode(),
    }
