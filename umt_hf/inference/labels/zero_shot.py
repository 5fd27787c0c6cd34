"""Classes as texts: a model of videos and texts names what it was never trained to name.

A class's vector is the mean of the unit vectors of its prompts, made a unit vector again; a video's probabilities are
the softmax of its similarities with the classes, at the model's temperature.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021 (prompts and
their ensembles; the two sets of CLIP here are those of its published `prompts.md` for actions).

Legend: C classes, P prompts of a class, D width of a vector.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from ...modeling.losses_umt import normalize_features
from ...modeling.modeling_umt_video_text import UMTVideoTextModel
from ...runs.arguments import KeptTokenArguments
from ..classification import VideoClassifier, build_patient_accelerator
from ..engine import DType, choose_dtype, compile_model
from ..search import VideoTextEncoder

PLACE = "{}"  # of a class in a prompt
TEXTS_AT_A_TIME = 256
_KINDS = ("photo", "video", "example", "demonstration")
_DOINGS = ("", " using", " doing", " during", " performing", " practicing")
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "video": ("a video of {}",),
    "plain": ("{}",),
    "clip_kinetics": tuple(
        f"a {kind} of {who}{{}}." for kind, who in product(_KINDS, ("", *(f"a person{doing} " for doing in _DOINGS)))
    ),
    "clip_ucf101": tuple(
        f"a {kind} of {who} person{doing} {{}}." for doing, who, kind in product(_DOINGS, ("a", "the"), _KINDS)
    ),
}
DEFAULT_TEMPLATES = ("video",)


def read_templates(templates: Sequence[str]) -> list[str]:
    """Prompts with a place for the class.

    Args:
        templates: Names of `TEMPLATE_SETS`, files with a prompt a line, and prompts, in any mixture.

    Raises:
        TypeError: If they are one text.
        ValueError: If there is none, one of them has no place `{}` for the class or two, or comes twice.
    """
    if isinstance(templates, str):
        raise TypeError(f"templates must be a list of texts, got {templates!r}.")
    found: list[str] = []
    for template in templates:
        if template in TEMPLATE_SETS:
            found += TEMPLATE_SETS[template]
        elif PLACE not in template and Path(template).is_file():
            lines = Path(template).read_text(encoding="utf-8-sig").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        else:
            found.append(template)
    if not found:
        raise ValueError("There is no template; give at least one, such as 'a video of {}'.")
    for template in found:
        if template.count(PLACE) != 1 or template.replace(PLACE, "").count("{"):
            raise ValueError(
                f"The template {template!r} must have one {{}}, where the class comes; {', '.join(TEMPLATE_SETS)} are "
                "the names of sets that ship, and a file has a template a line."
            )
    if twice := [template for template, times in Counter(found).items() if times > 1]:
        raise ValueError(f"The template {twice[0]!r} comes twice, and would count twice.")
    return found


def check_classes(labels: Sequence[str]) -> list[str]:
    """Names of classes without outer spaces.

    Raises:
        TypeError: If they are one text, or not texts.
        ValueError: If there are fewer than two, one is empty, or two are equal.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels must be a list of texts, got {labels!r}.")
    names = [label.strip() for label in labels]
    if len(names) < 2:
        raise ValueError(f"labels: {len(names)} given; give at least two classes, among which a video's is chosen.")
    if not all(names):
        raise ValueError("labels: one of them is empty.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"labels: {twice[0]!r} comes twice.")
    return names


class ZeroShotHead(nn.Module):
    """A dual encoder that answers as a classifier does.

    Args:
        model: The dual encoder.
        class_vectors: A unit vector per class, `(C, D)`.
        labels: Names of the classes.
        name: Of the model, for messages.
    """

    def __init__(self, model: UMTVideoTextModel, class_vectors: torch.Tensor, labels: Sequence[str], name: str):
        super().__init__()
        self.model = model
        # The classes are part of what makes a result, and so of the fingerprint.
        self.class_vectors = nn.Buffer(class_vectors)
        names = dict(enumerate(labels))
        self.config = PreTrainedConfig(id2label=names, label2id={label: i for i, label in names.items()})
        self.name_or_path = name

    @property
    def dtype(self) -> torch.dtype:
        """That of the dual encoder."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """That of the dual encoder."""
        return self.model.device

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Similarities over the temperature: `logits (B, C)`, float32, for videos `(B, T, channels, H, W)`."""
        vectors = self.model.get_video_features(pixel_values).pooler_output
        temperature = cast("torch.Tensor", self.model.temperature).float()
        return ImageClassifierOutput(logits=vectors.float() @ self.class_vectors.float().T / temperature)


@torch.inference_mode()
def encode_classes(encoder: VideoTextEncoder, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Vectors of classes, float32 `(C, D)`, of length 1.

    Args:
        encoder: Model and processor.
        labels: Names of the classes.
        templates: Prompts with one `{}` each.
    """
    texts = [template.replace(PLACE, label) for label in labels for template in templates]
    parts = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        part = texts[start : start + TEXTS_AT_A_TIME]
        inputs = encoder.processor(text=part, padding=True, return_tensors="pt").to(encoder.device)
        parts.append(normalize_features(encoder.model.get_text_features(**inputs).pooler_output).float())
    return normalize_features(torch.cat(parts).unflatten(0, (len(labels), len(templates))).mean(dim=1))


class ZeroShotVideoClassifier(VideoClassifier):
    """Names what videos show among classes that are given as texts: loads once, answers often, as `VideoClassifier`.

    Args:
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        labels: Names of the classes, at least two.
        templates: Prompts with a place `{}` for the class, names of sets ("video", "plain", "clip_kinetics",
            "clip_ucf101"), and files with a prompt a line; several are an ensemble.
        device: Where it runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        dtype: What it is computed in; default: float32.
        tokens: Which tokens of a clip the encoder sees; default: as the model's configuration says.

    Raises:
        OSError: If there is no model, or no processor beside it.
        TypeError: If the labels or the templates are not a list of texts.
        ValueError: If the model lacks weights of the dual encoder, a label or a template makes no sense.

    Examples:
        >>> from umt_hf import ZeroShotVideoClassifier
        >>> classifier = ZeroShotVideoClassifier(
        ...     "umt-vit-b16-25m", ["dog", "cat"], ["a video of a {}"]
        ... )
        >>> best, other = classifier.classify("video.mp4")
        >>> round(best.probability + other.probability, 4)
        1.0
    """

    def __init__(
        self,
        model: str | os.PathLike,
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        tokens: KeptTokenArguments | None = None,
    ):
        self.labels, self.templates = check_classes(labels), read_templates(templates)
        encoder = VideoTextEncoder(model, None, device, attn_implementation, tokens, dtype or torch.float32)
        vectors = encode_classes(encoder, self.labels, self.templates)
        # It answers as one.
        head: Any = ZeroShotHead(encoder.model, vectors, self.labels, encoder.name)
        self.model = head
        self.fresh = tuple(f"model.{weight}" for weight in encoder.fresh)
        self.device, self.kept_tokens, self.many_labels = encoder.device, encoder.kept_tokens, False
        self.processor = encoder.processor.video_processor


def load_zero_shot_classifier(
    model: str | os.PathLike,
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    dtype: DType | None = None,
    torch_compile: bool = False,
    tokens: KeptTokenArguments | None = None,
) -> ZeroShotVideoClassifier:
    """The classifier of many files, as `umt-hf classify --labels` runs it.

    Args:
        model: Folder or Hub id of a stage-2 or retrieval model with its processor.
        labels: Names of the classes.
        templates: As for `ZeroShotVideoClassifier`.
        dtype: What it is computed in; default: bfloat16 on a GPU that has it, float32 elsewhere.
        torch_compile: Whether the video tower is compiled by `torch.compile`.
        tokens: Which tokens of a clip it sees; default: as its configuration says.

    Raises:
        ValueError: As `ZeroShotVideoClassifier` does, or if the type is unknown.
        OSError: As `ZeroShotVideoClassifier` does.
    """
    accelerator = build_patient_accelerator()
    chosen = choose_dtype(dtype, accelerator.device, accelerator.mixed_precision)
    classifier = ZeroShotVideoClassifier(model, labels, templates, accelerator.device, dtype=chosen, tokens=tokens)
    if torch_compile:
        compile_model(cast("ZeroShotHead", classifier.model).model)
    return classifier


__all__ = ["TEMPLATE_SETS", "ZeroShotVideoClassifier", "encode_classes", "load_zero_shot_classifier", "read_templates"]
