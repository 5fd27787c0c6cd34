"""Stage 1 end to end on the embedded data: render, train a tiny teacher, pre-train, export, load, evaluate, draw.

    python -m umt_hf.moving_shapes.probes --output_dir outputs/moving_shapes
    python -m umt_hf.moving_shapes.probes --output_dir outputs/seeds --seeds 10 11 12

Every step runs in a process of its own, as a user would run it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoVideoProcessor

from ..modeling.masking_umt_video import sample_attention_mask
from ..plots import plot_losses, plot_masks
from ..teachers.clip import UMTTeacher

APPEARANCES, MOTIONS = "appearance", "motion"
POOLINGS = {"mean": "mean over all tokens", "ordered": "one mean a frame, in time order"}
COLUMNS = {
    "motion, linear": (MOTIONS, "linear"),
    "motion, MLP": (MOTIONS, "MLP"),
    "appearance, linear": (APPEARANCES, "linear"),
}
CHANCE = {MOTIONS: 1 / 4, APPEARANCES: 1 / 36}
PROBE_STEPS = 800
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# Threads that wait without spinning leave the cores to the workers that decode.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Run one seed or several, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Each seed draws its own data and weights.")
    parser.add_argument("--max_steps", type=int, help="Shorten pre-training, for a quick look.")
    parser.add_argument("--evaluate", action="store_true", help="Only evaluate what lies in output_dir.")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.output_dir)
        return
    results = []
    for seed in args.seeds:
        folder = args.output_dir if len(args.seeds) == 1 else args.output_dir / f"seed_{seed}"
        results.append(run_seed(folder, seed, args.max_steps))
    print(format_table(results))
    if len(results) > 1:
        (args.output_dir / "table.md").write_text(format_table(results) + "\n")
    else:
        print(f"\nPictures: {args.output_dir / 'losses.png'}, {args.output_dir / 'masks.png'}")
    print(f"Model:    {args.output_dir / 'student'}  (AutoModel.from_pretrained)")


def run_seed(folder: Path, seed: int, max_steps: int | None) -> dict:
    """Data, teacher, student and evaluation of one seed; what exists already is not made again."""
    data, teacher, student = folder / "data", folder / "teacher", folder / "student"
    python = [sys.executable, "-m"]
    training = ["--train_data", data / "train.csv", "--validation_data", data / "validation.csv"]
    training += ["--teacher_name_or_path", teacher, "--output_dir", student, "--seed", seed]
    training += ["--resume_from_checkpoint", "auto"]
    training += [] if max_steps is None else ["--max_steps", max_steps]
    steps = [
        ("render the videos", [*python, "umt_hf.cli", "data", "moving-shapes", data, "--seed", seed]),
        (
            "train the teacher",
            [*python, "umt_hf.moving_shapes.tiny_clip", "--data", data, "--output_dir", teacher, "--seed", seed],
        ),
        ("pre-train", [*LAUNCH, "-m", "umt_hf.training.stage1", "--config", "stage1_moving_shapes", *training]),
        ("evaluate in a new process", [*python, "umt_hf.moving_shapes.probes", "--evaluate", "--output_dir", folder]),
    ]
    if (teacher / "config.json").is_file():
        del steps[1]
    seconds = run_steps(seed, steps)
    result = json.loads((folder / "results.json").read_text())
    result["seconds"] = seconds
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def run_steps(seed: int, steps: list[tuple[str, list]]) -> dict[str, float]:
    """Run named commands one after another, each in its own process; how many seconds each took."""
    seconds = {}
    for number, (name, command) in enumerate(steps, start=1):
        print(f"[seed {seed}, {number}/{len(steps)}] {name}", flush=True)
        started = time.perf_counter()
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, **ENVIRONMENT})
        seconds[name] = round(time.perf_counter() - started, 1)
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), flush=True)
    return seconds


def evaluate(folder: Path) -> None:
    """Load the exported folder, embed all clips, fit the probes, write results and pictures."""
    torch.manual_seed(0)
    processor = AutoVideoProcessor.from_pretrained(folder / "student")
    student = AutoModel.from_pretrained(folder / "student").eval()
    untrained = AutoModel.from_config(student.config).eval()
    teacher = UMTTeacher.from_pretrained(folder / "teacher", num_aligned_layers=1)

    @torch.no_grad()
    def embed_clips(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """One vector a frame from each network, `(B, T, D)`."""
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
                row[column] = fit_probe(features, build_probe=PROBES[probe])
            print(
                f"  {network}, {POOLINGS[pooling]}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True
            )
    (folder / "results.json").write_text(json.dumps({"accuracy": accuracy}, indent=2) + "\n")
    plot_losses(folder / "student" / "metrics.jsonl", folder / "losses.png")
    draw_masks(folder, processor, teacher, student.config.mask_ratio)


def embed_split(data: Path, split: str, processor, embed_clips) -> dict[str, torch.Tensor]:
    """Features and labels of a split."""
    rows = [line.rsplit(",", 1) for line in (data / f"{split}_motion.csv").read_text().splitlines()]
    appearances = [line.rsplit(",", 1)[1] for line in (data / f"{split}_appearance.csv").read_text().splitlines()]
    parts = []
    for start in tqdm(range(0, len(rows), 50), desc=f"embedding {split}", unit="batch"):
        videos = [str(data / name) for name, _ in rows[start : start + 50]]
        parts.append(embed_clips(processor(videos, return_tensors="pt")["pixel_values"]))
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    labels = {MOTIONS: [int(label) for _, label in rows], APPEARANCES: [int(label) for label in appearances]}
    return {**features, **{name: torch.tensor(values) for name, values in labels.items()}}


def pool(frames: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a clip from its vectors a frame `(clips, T, D)`."""
    return frames.mean(dim=1) if pooling == "mean" else frames.flatten(1)


def build_mlp(num_inputs: int, num_labels: int) -> torch.nn.Module:
    """Probe with one hidden layer."""
    hidden = torch.nn.Linear(num_inputs, 256)
    return torch.nn.Sequential(hidden, torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(256, num_labels))


PROBES = {"linear": torch.nn.Linear, "MLP": build_mlp}


def fit_probe(
    splits: list[tuple[torch.Tensor, torch.Tensor]], build_probe: Callable[[int, int], torch.nn.Module]
) -> float:
    """Test accuracy of a probe on standardised features, at the step where the validation split is best.

    Args:
        splits: Features and labels of the training, validation and test clips.
        build_probe: Makes the probe from the numbers of inputs and labels.
    """
    (train, train_labels), *held_out = splits
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, held_out = (train - mean) / std, [((features - mean) / std, labels) for features, labels in held_out]
    torch.manual_seed(0)
    probe = build_probe(train.shape[1], int(train_labels.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_STEPS)
    best = (-1.0, 0.0)
    for step in range(1, PROBE_STEPS + 1):
        batch = torch.randint(len(train), (256,))
        loss = torch.nn.functional.cross_entropy(probe.train()(train[batch]), train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            with torch.no_grad():
                scores = [(probe.eval()(x).argmax(1) == y).float().mean().item() for x, y in held_out]
            best = max(best, tuple(scores))
    return best[1]


def draw_masks(folder: Path, processor, teacher, mask_ratio: float) -> None:
    """Saliency and visible patches over the frames of a held-out clip."""
    caption = json.loads((folder / "data" / "test_captions.json").read_text())[0]
    clip = processor(str(folder / "data" / caption["video"]), return_tensors="pt")["pixel_values"]
    saliency = teacher(clip).saliency
    mask = sample_attention_mask(saliency, mask_ratio, clip.shape[1], torch.Generator().manual_seed(0))
    plot_masks(clip[0], saliency, mask[0], folder / "masks.png", caption["caption"])


def format_table(results: list[dict]) -> str:
    """Accuracy of every network, as mean and spread over seeds."""
    names = {
        "student, mean": "(a) student after stage 1, mean over all tokens",
        "student, ordered": "(a) the same, one mean a frame in time order",
        "random weights, mean": "(b) random weights, mean over all tokens",
        "random weights, ordered": "(b) the same, one mean a frame in time order",
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
