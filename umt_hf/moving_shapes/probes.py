"""What the features of stage 1 hold: probes on the student of the embedded data, untrained weights and the teacher.

    python -m umt_hf.moving_shapes.probes --output_dir outputs/moving_shapes

Reads the folders `data`, `teacher` and `student` that `tour` leaves; writes accuracies and pictures beside them.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoModel

from ..inference.loading import load_complete_model, load_video_processor
from ..modeling.masking_umt_video import sample_attention_mask
from ..modeling.modeling_umt_video import UMTVideoModel
from ..plots import plot_losses, plot_masks
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.folder import LOSS_PICTURE, METRICS_FILE
from ..runs.preflight import name_folder
from ..teachers.teacher import UMTTeacher

APPEARANCES, MOTIONS = "appearance", "motion"
POOLINGS = {"mean": "mean over all tokens", "ordered": "one mean per frame, in time order"}
COLUMNS = {
    "motion, linear": (MOTIONS, "linear"),
    "motion, MLP": (MOTIONS, "MLP"),
    "appearance, linear": (APPEARANCES, "linear"),
}
CHANCE = {MOTIONS: 1 / 4, APPEARANCES: 1 / 36}
PROBE_STEPS = 800


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and evaluate.

    Args:
        arguments: Command line; `None` = the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=name_folder, default=Path("outputs/moving_shapes"), help="Folder of the tour."
    )
    parser.add_argument("--probe_steps", type=int, default=PROBE_STEPS, help="Optimizer steps of a probe.")
    args = parser.parse_args(arguments)
    measure_probes(args.output_dir, args.probe_steps)


def measure_probes(folder: Path, probe_steps: int = PROBE_STEPS) -> None:
    """Load the exported folder, embed all clips, fit the probes, write results and pictures.

    Args:
        folder: Folder of the tour.
        probe_steps: Optimizer steps of a probe.
    """
    torch.manual_seed(0)
    processor = load_video_processor(folder / "student")
    student = load_complete_model(UMTVideoModel, folder / "student").eval()
    untrained = AutoModel.from_config(student.config).eval()
    teacher = UMTTeacher.from_pretrained(str(folder / "teacher"), num_aligned_layers=1)

    @torch.no_grad()
    def embed_clips(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """One vector per frame from each network, `(B, T, D)`."""
        num_frames = pixel_values.shape[1]
        frames = teacher.vision_tower(pixel_values=pixel_values.flatten(0, 1)).image_embeds
        tokens = {
            "student": student(pixel_values).last_hidden_state,
            "random weights": untrained(pixel_values).last_hidden_state,
        }
        features = {name: value.unflatten(1, (num_frames, -1)).mean(2) for name, value in tokens.items()}
        return {**features, "teacher": frames.unflatten(0, (-1, num_frames))}

    splits = {
        split: embed_split(folder / "data", split, processor, embed_clips) for split in ("train", "validation", "test")
    }
    accuracy: dict[str, dict[str, float]] = {}
    for network in ("student", "random weights", "teacher"):
        for pooling in POOLINGS:
            row = accuracy[f"{network}, {pooling}"] = {}
            for column, (task, probe) in COLUMNS.items():
                features = [(pool(split[network], pooling), split[task]) for split in splits.values()]
                row[column] = fit_probe(features, PROBES[probe], probe_steps)
            typer.echo(f"  {network}, {POOLINGS[pooling]}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
    results = {"accuracy": accuracy, "num_clips": len(splits["test"][MOTIONS])}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_losses(folder / "student" / METRICS_FILE, folder / LOSS_PICTURE)
    draw_masks(folder, processor, teacher, student.config.mask_ratio)


def embed_split(
    data: Path,
    split: str,
    processor: UMTVideoProcessor,
    embed_clips: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Features and labels of a split.

    Args:
        data: Folder with the annotations of the split.
        split: What their names start with.
        processor: Reads the clips.
        embed_clips: Features by name, of clips `(B, T, C, H, W)`.

    Returns:
        The features of all clips by name, and the labels by the name of their task.
    """
    rows, appearances = (
        [line.rsplit(",", 1) for line in (data / f"{split}_{task}.csv").read_text(encoding="utf-8").splitlines()]
        for task in ("motion", "appearance")
    )
    appearances = [label for _, label in appearances]
    parts = []
    for start in tqdm(range(0, len(rows), 50), desc=f"embedding {split}", unit="batch"):
        videos = [str(data / name) for name, _ in rows[start : start + 50]]
        parts.append(embed_clips(processor(videos, return_tensors="pt")["pixel_values"]))
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    labels = {MOTIONS: [int(label) for _, label in rows], APPEARANCES: [int(label) for label in appearances]}
    return {**features, **{name: torch.tensor(values) for name, values in labels.items()}}


def pool(frames: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per clip from its vectors per frame `(clips, T, D)`."""
    return frames.mean(dim=1) if pooling == "mean" else frames.flatten(1)


def build_mlp(num_inputs: int, num_labels: int) -> torch.nn.Module:
    """Probe with one hidden layer."""
    hidden = torch.nn.Linear(num_inputs, 256)
    return torch.nn.Sequential(hidden, torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(256, num_labels))


PROBES = {"linear": torch.nn.Linear, "MLP": build_mlp}


def fit_probe(
    splits: list[tuple[torch.Tensor, torch.Tensor]],
    build_probe: Callable[[int, int], torch.nn.Module],
    max_steps: int = PROBE_STEPS,
) -> float:
    """Test accuracy of a probe on standardised features, at the step where the validation split is best.

    Args:
        splits: Features and labels of the training, validation and test clips.
        build_probe: Makes the probe from the numbers of inputs and labels.
        max_steps: Optimizer steps; the validation split is tried every 50.
    """
    (train, train_labels), *held_out = splits
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, held_out = (train - mean) / std, [((features - mean) / std, labels) for features, labels in held_out]
    torch.manual_seed(0)
    probe = build_probe(train.shape[1], int(train_labels.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    best = (-1.0, 0.0)  # accuracy on the validation and on the test split
    for step in range(1, max_steps + 1):
        batch = torch.randint(len(train), (256,))
        loss = torch.nn.functional.cross_entropy(probe.train()(train[batch]), train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            with torch.no_grad():
                validation, test = ((probe.eval()(x).argmax(1) == y).float().mean().item() for x, y in held_out)
            best = max(best, (validation, test))
    return best[1]


def draw_masks(folder: Path, processor: UMTVideoProcessor, teacher: UMTTeacher, mask_ratio: float) -> None:
    """Saliency and visible patches over the frames of a held-out clip."""
    caption = json.loads((folder / "data" / "test_captions.json").read_text(encoding="utf-8"))[0]
    clip = processor(str(folder / "data" / caption["video"]), return_tensors="pt")["pixel_values"]
    saliency = teacher(clip).saliency
    mask = sample_attention_mask(saliency, mask_ratio, clip.shape[1], torch.Generator().manual_seed(0))
    plot_masks(clip[0], saliency, mask[0], folder / "masks.png", caption["caption"])


def format_probe_table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracy of every network, as mean and spread over seeds."""
    names = {
        "student, mean": "(a) student after stage 1, mean over all tokens",
        "student, ordered": "(a) the same, one mean per frame in time order",
        "random weights, mean": "(b) random weights, mean over all tokens",
        "random weights, ordered": "(b) the same, one mean per frame in time order",
        "teacher, mean": "(c) frozen teacher, averaged over frames",
        "teacher, ordered": "(d) frozen teacher, frame features in time order",
    }
    lines = ["| probe on | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for key, name in names.items():
        cells = []
        for column in COLUMNS:
            values = [result["accuracy"][key][column] for result in results]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    chance = [f"{CHANCE[task]:.3f}" for task, _ in COLUMNS.values()]
    lines.append(
        "| chance; for motion also the most that frames without their order can tell | " + " | ".join(chance) + " |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
