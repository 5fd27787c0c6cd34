"""Pictures of a run: its losses, what teacher and student look at in a clip, videos found for a text, timelines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange, repeat
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .runs.disk import name_unfinished, put_file
from .runs.folder import read_metrics
from .runs.mistakes import naming_full_disk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_SHARE = 0.65  # of a saliency picture; the rest is the frame
HIDDEN_GREY = 0.85
STAGE_1_CURVES = {"loss": "training", "eval_loss": "held out"}
STAGE_2_CURVES = {
    "video_uta_loss": "token alignment (UTA)",
    "video_vtc_loss": "video-text contrast (VTC)",
    "video_vtm_loss": "video-text matching (VTM)",
    "video_mlm_loss": "masked language modelling (MLM)",
}


def plot_losses(
    metrics_file: str | Path,
    picture: str | Path,
    curves: dict[str, str] = STAGE_1_CURVES,
    ylabel: str = "alignment loss, 2 - 2 cos",
) -> None:
    """Draw losses against optimizer steps.

    Args:
        metrics_file: `metrics.jsonl` of a run.
        picture: PNG to write.
        curves: Label of each loss that is drawn.
        ylabel: What the vertical axis shows.
    """
    plot_curves(read_metrics(metrics_file), picture, curves, ylabel)


def plot_curves(lines: Sequence[dict[str, Any]], picture: str | Path, curves: dict[str, str], ylabel: str) -> None:
    """Draw what a run has logged against optimizer steps.

    Args:
        lines: Of the log, each with its `step`.
        picture: PNG to write.
        curves: Label of each value that is drawn.
        ylabel: What the vertical axis shows.
    """
    figure, axes = _build_figure(1, 1, (7, 4))
    axis = axes[0, 0]
    for name, label in curves.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "o-" if name.startswith("eval") else "-", label=label, markersize=4)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, picture, dpi=150)


@dataclass(frozen=True)
class AccuracyPanel:
    """Accuracy against steps of several kinds of runs, for one part of a picture.

    Args:
        title: What is drawn.
        curves: Label -> one list of `(step, accuracy)` for each seed, all at the same steps.
        chance: Accuracy of a guess, in [0, 1].
    """

    title: str
    curves: dict[str, list[list[tuple[int, float]]]]
    chance: float


def plot_accuracy(panels: Sequence[AccuracyPanel], picture: str | Path) -> None:
    """Draw accuracy against optimizer steps: the mean of the seeds, their standard deviation shaded.

    Args:
        panels: Parts of the picture, two in a row; a label has the same colour in all of them.
        picture: PNG to write.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    num_rows = (len(panels) + 1) // 2
    figure, axes = _build_figure(num_rows, 2, (10, 3.6 * num_rows + 0.4))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, seeds in panel.curves.items():
            steps = [step for step, _ in seeds[0]]
            values = np.array([[accuracy for _, accuracy in seed] for seed in seeds])
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=min(len(values) - 1, 1))
            color = f"C{labels.index(label)}"
            axis.plot(steps, mean, "o-", color=color, label=label, markersize=3)
            axis.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
        axis.axhline(panel.chance, color="grey", linestyle=":", label="chance")
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("fine-tuning step")
        axis.set_ylabel("held-out accuracy")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    handles = dict(
        pair for axis in axes.flat for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True)
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5), fontsize=9)
    _save(figure, picture, dpi=130)


@dataclass(frozen=True)
class FoundVideo:
    """A query and the video that was found for it.

    Args:
        query: Text.
        caption: What the video shows.
        is_right: Whether it belongs to the query.
        pixel_values: Normalised clip `(T, 3, H, W)`.
    """

    query: str
    caption: str
    is_right: bool
    pixel_values: torch.Tensor


def plot_found_videos(found: Sequence[FoundVideo], picture: str | Path) -> None:
    """Draw the frames of each query's best video, one query a row, green where it is right and red where it is not.

    Args:
        found: Queries and what was found.
        picture: PNG to write.
    """
    num_frames = max(len(video.pixel_values) for video in found)
    # No automatic layout: the length of a title would set the first column apart.
    figure, axes = _build_figure(
        len(found),
        num_frames,
        (1.25 * num_frames, 1.55 * len(found)),
        layout=None,
        gridspec_kw={"wspace": 0.08, "hspace": 0.3},
    )
    for row, video in zip(axes, found, strict=True):
        color = "tab:green" if video.is_right else "tab:red"
        verdict = "right" if video.is_right else f"wrong: shows {video.caption}"
        row[0].set_title(f'"{video.query}" - {verdict}', fontsize=10, color=color, loc="left")
        for axis, frame in zip(row, denormalize(video.pixel_values), strict=False):
            axis.imshow(frame)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color=color, linewidth=2)
    _save(figure, picture, dpi=120, bbox_inches="tight")


def denormalize(pixel_values: torch.Tensor) -> np.ndarray:
    """Frames `(T, H, W, 3)` in [0, 1] of a normalised clip `(T, 3, H, W)`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return rearrange((pixel_values.cpu() * std + mean).clamp(0, 1), "t c h w -> t h w c").numpy()


@dataclass(frozen=True)
class MaskedFrames:
    """Pictures of a clip's frames, each `(T, H, W, 3)` in [0, 1].

    Args:
        clip: The frames themselves.
        saliency: With the teacher's saliency over them, bright where it looks.
        visible: What the student sees; hidden patches are grey.
    """

    clip: np.ndarray
    saliency: np.ndarray
    visible: np.ndarray


def draw_masked_frames(pixel_values: torch.Tensor, saliency: torch.Tensor, mask: torch.Tensor) -> MaskedFrames:
    """Lay the teacher's saliency and the student's mask over the frames of a clip.

    Args:
        pixel_values: Normalised clip `(T, 3, H, W)`.
        saliency: Teacher's class-token attention `(T, P)`.
        mask: Boolean `(T * P,)`, `True` = hidden.
    """
    from matplotlib import colormaps

    frames = denormalize(pixel_values)
    num_frames, height, width = frames.shape[:3]
    rows = round((saliency.shape[1] * height / width) ** 0.5)
    size = {"h": rows, "ph": height // rows, "pw": width // (saliency.shape[1] // rows)}
    pattern = "t (h w) -> t (h ph) (w pw)"
    heat = repeat(saliency.cpu().numpy(), pattern, **size)
    hidden = repeat(mask.cpu().view(num_frames, -1).numpy(), pattern, **size)
    colors = colormaps["inferno"](heat / float(np.quantile(heat, 0.99)))[..., :3]
    overlaid = HEAT_SHARE * colors + (1 - HEAT_SHARE) * frames
    return MaskedFrames(frames, overlaid, np.where(hidden[..., None], HIDDEN_GREY, frames))


def plot_masks(
    pixel_values: torch.Tensor, saliency: torch.Tensor, mask: torch.Tensor, picture: str | Path, title: str = ""
) -> None:
    """Draw a clip, the teacher's saliency over it, and the patches that the student sees, frame by frame.

    Args:
        pixel_values: Normalised clip `(T, 3, H, W)`.
        saliency: Teacher's class-token attention `(T, P)`.
        mask: Boolean `(T * P,)`, `True` = hidden.
        picture: PNG to write.
        title: Line above the frames.
    """
    drawn = draw_masked_frames(pixel_values, saliency, mask)
    rows = {"clip": drawn.clip, "teacher's saliency": drawn.saliency, "what the student sees": drawn.visible}
    num_frames = len(drawn.clip)
    figure, axes = _build_figure(3, num_frames, (1.35 * num_frames, 4.6))
    for row, (name, frames) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(frame)
            axis.set_xticks([])
            axis.set_yticks([])
    for t, axis in enumerate(axes[0], start=1):
        axis.set_title(f"frame {t}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, picture, dpi=130)


@dataclass(frozen=True)
class PicturedFrame:
    """A key frame with what was found in it and what is there. Boxes are shares of the frame, `(M, 4)`.

    Args:
        image: uint8 RGB `(height, width, 3)`.
        title: Line above it.
        boxes: Boxes that were given to the model.
        labels: Names and scores at each of them.
        true_boxes: Annotated boxes.
        true_labels: Names at each of them.
    """

    image: np.ndarray
    title: str
    boxes: np.ndarray
    labels: list[list[tuple[str, float]]]
    true_boxes: np.ndarray
    true_labels: list[list[str]]


def plot_detections(frames: Sequence[PicturedFrame], picture: str | Path) -> None:
    """Draw key frames with boxes: found ones solid, with names and scores; true ones dashed, with names.

    Args:
        frames: Key frames.
        picture: PNG to write.
    """
    columns = min(len(frames), 4)
    rows = -(-len(frames) // columns)
    figure, axes = _build_figure(rows, columns, (3.4 * columns, 3.6 * rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, frame in zip(axes.flat, frames, strict=False):
        axis.imshow(frame.image)
        axis.set_title(frame.title, fontsize=8)
        named = [[f"{name} {score:.2f}" for name, score in labels] for labels in frame.labels]
        _draw_boxes(axis, frame, frame.true_boxes, frame.true_labels, "white", "--", is_below=True)
        _draw_boxes(axis, frame, frame.boxes, named, "tab:orange", "-", is_below=False)
    figure.suptitle("orange: found, with scores; white, dashed: annotated", fontsize=10)
    _save(figure, picture, dpi=130, bbox_inches="tight")


def _draw_boxes(
    axis: "Axes",
    frame: PicturedFrame,
    boxes: np.ndarray,
    labels: list[list[str]],
    color: str,
    line: str,
    is_below: bool,
) -> None:
    from matplotlib.patches import Rectangle

    height, width = frame.image.shape[:2]
    for (x1, y1, x2, y2), names in zip(boxes * [width, height, width, height], labels, strict=True):
        # The edges of a pixel lie half a pixel from its middle, where `imshow` counts from.
        corner = (x1 - 0.5, y1 - 0.5)
        axis.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=line, linewidth=2))
        axis.text(
            x1,
            y2 if is_below else y1,
            "\n".join(names),
            fontsize=8,
            color="black",
            verticalalignment="top" if is_below else "bottom",
            bbox={"facecolor": color, "alpha": 0.75, "pad": 1.5, "linewidth": 0},
        )


@dataclass(frozen=True)
class TimelineSpan:
    """A stretch of a video and how likely classes are in it.

    Args:
        start_seconds: When it begins.
        end_seconds: When it ends.
        probabilities: Of the classes that were ranked, by name.
    """

    start_seconds: float
    end_seconds: float
    probabilities: dict[str, float]


def plot_timeline(
    spans: Sequence[TimelineSpan],
    picture: str | Path,
    title: str = "",
    max_classes: int = 8,
    comment: str | None = None,
) -> None:
    """Draw how likely classes are along a video, one line each, best ones first; a gap where a span has no value.

    Args:
        spans: Stretches in the order of time.
        picture: PNG to write.
        title: Line above it.
        max_classes: Lines at most; those that reach the highest probability are drawn.
        comment: Text that the file has beside the picture.
    """
    best: dict[str, float] = {}
    for span in spans:
        for name, probability in span.probabilities.items():
            best[name] = max(best.get(name, 0.0), probability)
    names = sorted(best, key=lambda name: -best[name])[:max_classes]
    figure, axes = _build_figure(1, 1, (9, 3.6))
    axis = axes[0, 0]
    lines = []
    for number, name in enumerate(names):
        values = [span.probabilities.get(name, math.nan) for span in spans]  # not among those that were kept
        # Where windows overlap, the later one counts from its start on.
        edges = [*(span.start_seconds for span in spans), spans[-1].end_seconds]
        lines.append(axis.stairs(values, edges, baseline=None, color=f"C{number}", linewidth=1.8))
    axis.set_xlabel("seconds")
    axis.set_ylabel("probability")
    axis.set_ylim(0, 1.02)
    end = max(span.end_seconds for span in spans)
    axis.set_xlim(spans[0].start_seconds, end if end > spans[0].start_seconds else end + 1)  # of a single frame
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=10)
    # Written afterwards, since a legend leaves out labels that begin with an underscore.
    legend = axis.legend(lines, ["class"] * len(lines), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    _save(figure, picture, dpi=120, metadata=None if comment is None else {"Comment": comment})


def plot_confusion_matrix(matrix: np.ndarray, names: list[str], picture: str | Path) -> None:
    """Draw which classes are taken for which, as shares of each class's videos.

    Args:
        matrix: Counts, `(classes, classes)`, a row for each true class.
        names: Names of the classes; written only where they fit, up to 40.
        picture: PNG to write.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.3 * len(names)), 12.0)
    figure, axes = _build_figure(1, 1, (side + 1, side))
    axis = axes[0, 0]
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    names = [_replace_foreign(name) for name in names]  # the axes write them again when they are drawn
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    figure.colorbar(image, label="share of the class's videos", shrink=0.8)
    _save(figure, picture, dpi=130)


def _build_figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    layout: Literal["constrained"] | None = "constrained",
    **options: Any,
) -> tuple["Figure", np.ndarray]:
    """A figure of `size` inches that belongs to no back end, and its axes `(rows, columns)`."""
    from matplotlib.figure import Figure  # slow to import, and not needed by those who draw nothing

    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: "Figure", picture: str | Path, **options: Any) -> None:
    """Write a figure, complete or not at all; its texts are names and captions, in which `$` begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(_replace_foreign(text.get_text()))
    path = Path(picture)
    unfinished = name_unfinished(path)
    with naming_full_disk(path):
        figure.savefig(unfinished, format=path.suffix.removeprefix(".") or "png", **options)
        put_file(unfinished, path)


def _replace_foreign(text: str) -> str:
    """A text without what is not UTF-8, which matplotlib cannot draw."""
    return text.encode(errors="replace").decode()
