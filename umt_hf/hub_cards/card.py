"""Model cards: what a finished folder is, how to use it, and what is known of its training and quality.

A released checkpoint's card is filled from the zoo and from the record of its conversion, that of a run from what the
run has written. A number without a source is left out.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..inference.loading import list_class_names
from ..inference.starts import read_model_fields, require_model_type
from ..modeling.configuration_umt_video import UMTVideoConfig
from ..modeling.configuration_umt_video_text import UMTVideoTextConfig
from ..plots import STAGE_1_CURVES, STAGE_2_CURVES, plot_curves
from ..runs.config import load_recipe
from ..runs.disk import write_text
from ..runs.folder import (
    CARD_FILE,
    CONVERSION_FILE,
    LOSS_PICTURE,
    PROCESSOR_FILE,
    VERSIONS_FILE,
    VIDEO_PROCESSOR_FILE,
)
from ..runs.models import MODEL_TYPES, MODELS_BY_NAME, ModelClass
from ..runs.summary import (
    MeasuredFigure,
    find_setting,
    read_compute,
    read_evaluations,
    read_history,
    read_optional_json,
    read_run_settings,
)
from ..zoo import ZooEntry
from .convert_umt_checkpoint import describe_checkpoint

LICENSES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "unknown": "unknown"}
PAPER = "2303.16058"
METRIC_TYPES = {"top-1 accuracy": "accuracy", "frame mAP at IoU 0.5": "mean_average_precision"}


def write_model_card(folder: str | Path, zoo_entry: ZooEntry | None = None, repo_id: str | None = None) -> Path:
    """Write or replace the `README.md` of a finished folder, and the picture of its losses where the run logged them.

    Args:
        folder: With `config.json` and weights.
        zoo_entry: The released checkpoint it was converted from; by default what `conversion.json` says.
        repo_id: Where it is, or will be, on the Hub; by default examples load the folder's name.

    Returns:
        The card.

    Raises:
        ValueError: If the folder holds no model of ours, or the Hub would not take the name.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    folder = Path(folder)
    card = build_model_card(folder, zoo_entry, repo_id)
    path = folder / CARD_FILE
    write_text(path, str(card))
    return path


def build_model_card(folder: Path, zoo_entry: ZooEntry | None = None, repo_id: str | None = None) -> ModelCard:
    """The card of `write_model_card`; a picture of the losses is written already.

    Raises:
        ValueError: As for `write_model_card`.
    """
    config, model_class = load_model_config(folder)
    conversion = read_optional_json(folder / CONVERSION_FILE)
    if zoo_entry is None and conversion:
        zoo_entry = describe_checkpoint(conversion["name"])
    kind = MODELS_BY_NAME[model_class]
    # A released model's settings come from the zoo, since its folder holds no run.
    settings = {} if zoo_entry else read_run_settings(folder)
    evaluations = [] if zoo_entry else read_evaluations(folder, settings)
    name = (repo_id or "").rsplit("/", 1)[-1] or (zoo_entry.name if zoo_entry else folder.resolve().name)
    vision = getattr(config, "vision_config", config)
    processor = read_processor(folder)
    names = list_class_names(config) if kind.usage in ("classifier", "detector") else []
    content = ModelCard.from_template(
        build_card_data(name, kind, zoo_entry, settings, evaluations),
        template_path=str(resources.files("umt_hf.hub_cards") / "templates" / "model_card.md.jinja"),
        name=name,
        usage=kind.usage,
        model_class=model_class,
        entry=zoo_entry,
        conversion=conversion,
        local_id=repo_id or name,
        command=kind.command.format(model=repo_id or name),
        hub_id=repo_id or f"your-name/{name}",
        vision=vision,
        text=getattr(config, "text_config", None),
        num_frames=processor.get("num_frames") or vision.num_frames,
        sampling=processor.get("sampling_strategy"),
        num_labels=len(names),
        # Transformers fills missing names with LABEL_0 and so on, which would read as names.
        has_label_names=not all(re.fullmatch(r"LABEL_\d+", label) for label in names),
        example_labels=", ".join(names[:5]),
        unnamed=conversion.get("unnamed"),
        base_name=_name_start(zoo_entry, settings),
        recipe=dump_settings(load_published_settings(zoo_entry) if zoo_entry else settings),
        versions=read_optional_json(folder / VERSIONS_FILE) or conversion.get("versions", {}),
        loss_picture=None if zoo_entry else draw_losses(folder, model_class),
        figures=arrange_figures(zoo_entry) if zoo_entry else [],
        evaluations=evaluations,
        compute=[zoo_entry.compute] if zoo_entry and zoo_entry.compute else read_compute(folder),
        paper=PAPER,
    ).content
    # Blocks that a model does not need leave blank lines behind.
    return ModelCard(re.sub(r"\n{3,}", "\n\n", content).rstrip() + "\n")


def load_model_config(folder: Path) -> tuple[UMTVideoConfig | UMTVideoTextConfig, str]:
    """Configuration and class of the folder's model.

    Raises:
        ValueError: If it is none of ours.
    """
    try:
        fields = read_model_fields(folder)
    except OSError as error:
        raise ValueError(str(error)) from error
    require_model_type(folder, fields, MODEL_TYPES, "a UMT model")
    classes = {cls.model_type: cls for cls in (UMTVideoConfig, UMTVideoTextConfig)}
    model_class = next(iter(fields.get("architectures") or []), None)
    if model_class not in MODELS_BY_NAME:
        raise ValueError(f"{folder} holds a {model_class}, which is not a UMT model.")
    return classes[fields["model_type"]].from_pretrained(folder), model_class


def read_processor(folder: Path) -> dict[str, Any]:
    """Settings of the folder's video processor, empty where it has none."""
    video = read_optional_json(folder / VIDEO_PROCESSOR_FILE)
    return video or read_optional_json(folder / PROCESSOR_FILE).get("video_processor", {})


def build_card_data(
    name: str,
    kind: ModelClass,
    entry: ZooEntry | None,
    settings: dict[str, dict[str, Any]],
    evaluations: list[MeasuredFigure],
) -> ModelCardData:
    """Metadata of the card: what the Hub filters and lists by.

    Args:
        name: Of the model.
        kind: Of the model.
        entry: Of the zoo, if it is a released checkpoint.
        settings: Of the run, if it is none.
        evaluations: Of the run.
    """
    results = [
        EvalResult(
            task_type=kind.pipeline_tag,
            dataset_type=make_slug(figure.data_set),
            dataset_name=figure.data_set,
            metric_type=METRIC_TYPES.get(figure.metric, "recall"),
            metric_name=figure.metric + (f", {figure.views} views" if figure.views else ""),
            metric_value=figure.value,
            source_name="Model zoo of the published code",
            source_url=figure.source,
        )
        for figure in (entry.figures if entry else ())
    ]
    results += [
        EvalResult(
            task_type=kind.pipeline_tag,
            dataset_type=make_slug(found.data_set),
            dataset_name=found.data_set,
            dataset_split=found.split,
            metric_type=found.metric_type,
            metric_name=found.metric + (f", {found.views} views" if found.views else ""),
            metric_value=found.value,
        )
        for found in evaluations
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        # A licence is never guessed: the Hub shows none rather than a wrong one.
        license=LICENSES.get(entry.weights_license) if entry else None,
        tags=["umt", "unmasked-teacher", "video", *kind.tags, f"arxiv:{PAPER}"],
        datasets=[make_slug(data_set) for data_set in entry.trained_on if "pairs" not in data_set] if entry else None,
        base_model=entry.repo if entry and entry.file else None if entry else find_base_models(settings),
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=name,
    )


def make_slug(data_set: str) -> str:
    """Identifier of a data set in metadata: `Kinetics-400` -> `kinetics-400`; a Hub id stays."""
    return re.sub(r"[^a-z0-9./_-]+", "-", data_set.lower()).strip("-")


def find_base_models(settings: dict[str, dict[str, Any]]) -> list[str] | None:
    """Hub ids that a run started from, as far as they are known to be ids and no folders."""
    keys = ("model_name_or_path", "vision_name_or_path", "text_name_or_path")
    starts = [find_setting(settings, key) for key in keys]
    # A folder of this machine looks like an id, and linking it would lead to somebody's repository.
    is_known = re.compile(r"(?:google-bert|openai|google)/[\w.-]+")
    return [start for start in starts if start is not None and is_known.fullmatch(str(start))] or None


def _name_start(entry: ZooEntry | None, settings: dict[str, dict[str, Any]]) -> str | None:
    """Name of what training started from."""
    if entry is not None:
        return entry.starts_from
    start = find_setting(settings, "model_name_or_path") or find_setting(settings, "vision_name_or_path")
    return None if start is None else str(start).rstrip("/")


def load_published_settings(entry: ZooEntry) -> dict[str, dict[str, Any]]:
    """Sections of our recipe for an entry; none for a model that was never released."""
    return {} if entry.recipe is None else load_recipe(entry.recipe)


def dump_settings(settings: dict[str, dict[str, Any]]) -> str | None:
    """Sections as YAML, or `None` if there are none."""
    kept = {
        name: {key: value for key, value in values.items() if key != "output_dir" and value not in (None, [])}
        for name, values in settings.items()
    }
    return (
        yaml.safe_dump(kept, sort_keys=False, width=100, allow_unicode=True).rstrip() if any(kept.values()) else None
    )


def arrange_figures(entry: ZooEntry) -> list[tuple[str, str, float, str, str]]:
    """Published figures as rows of a table: what was done and on what, metric, value, views, address of the table."""
    return [
        (
            f"{figure.data_set}, {figure.protocol.replace('_', ' ').replace('zero shot', 'zero-shot')}",
            figure.metric,
            figure.value,
            figure.views or "",
            figure.source,
        )
        for figure in entry.figures
    ]


def draw_losses(folder: Path, model_class: str) -> str | None:
    """Draw the run's losses into the folder; the picture's name, or `None` if the run has logged none."""
    history = read_history(folder)
    if not any("loss" in line for line in history):
        return None
    # Both stages log `loss`; only stage 2 logs its parts.
    is_stage_2 = any(name in line for line in history for name in STAGE_2_CURVES)
    curves = STAGE_2_CURVES if is_stage_2 else STAGE_1_CURVES
    ylabel = "alignment loss, 2 - 2 cos" if model_class == "UMTVideoForPreTraining" else "loss"
    plot_curves(history, folder / LOSS_PICTURE, curves, ylabel)
    return LOSS_PICTURE


def describe_card(path: Path) -> dict[str, Any]:
    """A card's metadata and headings, for scripts."""
    card = ModelCard.load(path)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", card.text, flags=re.DOTALL | re.MULTILINE), re.M)
    return {"path": str(path), "metadata": card.data.to_dict(), "headings": headings}
