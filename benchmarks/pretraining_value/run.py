"""What stage 1 is worth when the encoder is fine-tuned, on the embedded data: against none and other pre-training.

    python -m benchmarks.pretraining_value.run --output_dir outputs/moving_shapes
    python -m benchmarks.pretraining_value.run --output_dir outputs/moving_shapes --seeds 10 11 12

Every start has the same weights before pre-training, the same clips, and then the same fine-tuning: from scratch; UMT
with semantic and with random masks; pixel reconstruction by Transformers' VideoMAE. Fine-tuning first fits the head on
the frozen encoder, and then trains everything. Two processes of one thread work through the runs; all seeds share data
and teacher. A demo that was stopped goes on where it was, and what was run with other settings is run again.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umt_hf.moving_shapes.probes import build_mlp, embed_split

# One thread in each of two processes is faster at this size than two threads in one.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
NUM_PROCESSES = 2
STARTS = {
    "scratch": "from scratch",
    "semantic": "UMT, semantic mask",
    "random": "UMT, random mask",
    "pixel": "pixel reconstruction (VideoMAE)",
}
MASK_TYPES = {"semantic": "attention", "random": "random"}
TASKS = {"appearance": 36, "motion": 4}
SPLITS = {"full": "train", "low": "train_low_data"}
LOW_DATA_STARTS = CORRUPTED_STARTS = ("scratch", "semantic")
LOW_DATA_RATIO = 0.1
CORRUPTIONS = ("noise", "blur", "brightness", "occlusion", "frame_drops")
SEVERITY = "medium"

STUDENT = {
    "image_size": 64,
    "patch_size": 16,
    "num_frames": 8,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
INITIALIZER_RANGE = 0.12  # 1 / sqrt(width): at the usual 0.02 so narrow an encoder hardly moves in a short run
MASK_RATIO = 0.8
PRETRAINING = {
    "drop_path_rate": 0.0,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "min_learning_rate": 1e-5,
    "scale_learning_rate": False,
    "warmup_steps": 30,
    "crop_scales": 1.0,
    "horizontal_flip_probability": 0.0,
    "dataloader_num_workers": 0,
    "logging_steps": 25,
    "save_steps": 100000,
    "report_to": "none",
    "mixed_precision": "bf16",
}
HEAD = {"batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.05}
FINETUNING = {
    "learning_rate": 5e-4,
    "layer_decay": 1.0,
    "warmup_epochs": 0,
    "warmup_steps": 20,
    "drop_path_rate": 0.0,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    # A mirrored clip turns the other way round.
    "horizontal_flip_probability": 0.0,
    "sampling_strategy": "segments",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 50,
    "test_clips": 1,
    "test_crops": 1,
    "dataloader_num_workers": 0,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": True,  # as in pre-training: a process keeps one precision
    "use_cpu": True,
    "disable_tqdm": True,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything; the defaults are the demo's."""

    num_clips: tuple[int, int, int] = (3000, 600, 900)
    teacher_steps: int = 1600
    pretraining_steps: int = 400
    head_steps: int = 800
    finetuning_steps: int = 100
    low_data_steps: int = 50
    num_curve_points: int = 5
    num_curve_clips: int = 120
    num_corrupted_clips: int = 300


@dataclass(frozen=True)
class Job:
    """A function of this file with its arguments, and the names of the jobs that it needs."""

    function: Callable[..., None]
    arguments: tuple
    needs: frozenset[str] = field(default_factory=frozenset)


def main(arguments: Sequence[str] | None = None, budget: Budget | None = None) -> None:
    """Prepare, run all seeds, print the tables and draw the curves.

    Args:
        arguments: Command line; `None` = the process's own.
        budget: How much of everything; `None` = the demo's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="Weights, order of clips, masks.")
    parser.add_argument("--num_processes", type=int, default=NUM_PROCESSES, help="Of one thread each.")
    budget = budget or Budget()
    for name in ("pretraining_steps", "head_steps", "finetuning_steps", "low_data_steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(budget, name), help="Default: %(default)s.")
    args = parser.parse_args(arguments)
    budget = dataclasses.replace(
        budget, **{name: value for name, value in vars(args).items() if name.endswith("steps")}
    )
    os.environ.update(ENVIRONMENT)
    started = time.perf_counter()
    prepare_data(args.output_dir, budget)
    with build_pool(args.num_processes, args.output_dir / "finetune") as pool:
        jobs = plan_jobs(args.output_dir, args.seeds, budget)
        run_jobs(jobs, pool, args.num_processes, args.output_dir / "finetune")
    report(args.output_dir / "finetune", args.seeds, budget)
    print(f"Time:    {(time.perf_counter() - started) / 60:.1f} minutes")


def prepare_data(folder: Path, budget: Budget) -> None:
    """Render the clips and their variants, and decode each once into a `.npy` file, which every run reads."""
    from umt_hf.moving_shapes.render import write_moving_shapes
    from umt_hf.moving_shapes.variants import write_corrupted_test, write_low_data

    data = write_moving_shapes(folder / "data", *budget.num_clips)
    write_low_data(data, LOW_DATA_RATIO)
    splits = ["train", "train_low_data", "validation", "test"]
    for corruption in CORRUPTIONS:
        write_corrupted_test(data, corruption, SEVERITY, budget.num_corrupted_clips)
        splits.append(f"test_{corruption}_{SEVERITY}")
    for split in splits:
        decode_split(data, folder / "finetune" / "frames", split)
    curve = budget.num_curve_clips
    for task in TASKS:
        for name, split, count in (
            ("curve", "validation", curve),
            ("test_intact", "test", budget.num_corrupted_clips),
        ):
            lines = (folder / "finetune" / "frames" / f"{split}_{task}.csv").read_text().splitlines(keepends=True)
            (folder / "finetune" / "frames" / f"{name}_{task}.csv").write_text("".join(lines[:count]))


def decode_split(data: Path, frames: Path, split: str) -> None:
    """Write the frames of every clip of a split, and `<split>_<task>.csv` that name them."""
    from umt_hf.processing.decoding import open_video

    for task in TASKS:
        with (data / f"{split}_{task}.csv").open() as annotation:
            rows = list(csv.reader(annotation))
        for name, _ in rows:
            target = (frames / name).with_suffix(".npy")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_video(data / name) as reader:
                    clip = reader.get_frames(range(reader.num_frames))
                np.save(target.with_suffix(".part.npy"), clip)
                target.with_suffix(".part.npy").rename(target)
        lines = [f"{Path(name).with_suffix('.npy')},{label}\n" for name, label in rows]
        (frames / f"{split}_{task}.csv").write_text("".join(lines))


def plan_jobs(folder: Path, seeds: Sequence[int], budget: Budget) -> dict[str, Job]:
    """All runs by name, in the order they start in if nothing is missing: seed by seed."""
    jobs = {"teacher": Job(train_teacher, (folder, budget.teacher_steps))}
    for seed in seeds:
        for start in STARTS:
            needs = frozenset({"teacher"} if start in MASK_TYPES else ())
            jobs[f"{seed}/{start}"] = Job(pretrain, (folder, seed, start, budget), needs)
        for start in STARTS:
            needs = frozenset({f"{seed}/{start}"})
            jobs[f"{seed}/{start}_heads"] = Job(fit_heads, (folder, seed, start, budget), needs)
        for task in TASKS:
            for start in STARTS:
                needs = frozenset({f"{seed}/{start}_heads"})
                for data in SPLITS if start in LOW_DATA_STARTS else ["full"]:
                    job = Job(fine_tune, (folder, seed, start, task, data, budget), needs)
                    jobs[f"{seed}/{start}_{task}_{data}"] = job
    return jobs


def run_jobs(jobs: dict[str, Job], pool: Executor, num_processes: int, logs: Path) -> None:
    """Run each job as soon as those it needs are done, no more at a time than there are processes.

    Raises:
        RuntimeError: If a job failed; it names the file with all that it said.
    """
    waiting, done, running, total = dict(jobs), set(), {}, len(jobs)
    while waiting or running:
        ready = [name for name, job in waiting.items() if job.needs <= done]
        for name in ready[: num_processes - len(running)]:
            running[pool.submit(run_job, name, waiting.pop(name), logs)] = name
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"A process was killed while {name} ran, perhaps for memory; its last words are in the newest "
                    f"{logs}/log_*.txt. The same command goes on where this one stopped."
                ) from error
            done.add(name)
            print(f"[{len(done)}/{total}] {name}", flush=True)


def run_job(name: str, job: Job, logs: Path) -> None:
    """Run a job in a process of the pool."""
    try:
        job.function(*job.arguments)
    except Exception as error:
        log = logs / f"log_{os.getpid()}.txt"
        raise RuntimeError(
            f"{name} failed: {error}\nWhat it said before is in {log}. The same command goes on where it stopped."
        ) from error


def build_pool(num_processes: int, folder: Path) -> Executor:
    """Processes whose output goes to `log_<process>.txt`."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), start_worker, (folder,))


def start_worker(folder: Path) -> None:
    """One thread, and all that the scripts say in a file."""
    torch.set_num_threads(1)
    log = (folder / f"log_{os.getpid()}.txt").open("a", buffering=1)
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())


def start_run(output: Path, **settings: Any) -> dict[str, Any] | None:
    """An emptied folder and the result to fill in, or `None` if the run is already done with the same settings."""
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    file = output / "result.json"
    if file.exists() and json.loads(file.read_text())["settings"] == settings:
        return None
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return {"settings": settings}


def describe_pretraining(start: str, budget: Budget) -> dict[str, Any]:
    """All settings that the weights of a start depend on."""
    student = {**STUDENT, "initializer_range": INITIALIZER_RANGE}
    if start == "scratch":
        return {"student": student}
    settings = {"num_clips": budget.num_clips, "steps": budget.pretraining_steps, "mask_ratio": MASK_RATIO}
    return {"student": student, "pretraining": {**settings, **PRETRAINING}}


def describe_heads(start: str, budget: Budget) -> dict[str, Any]:
    """All settings that the heads on a frozen start depend on."""
    head = {**HEAD, "steps": budget.head_steps, "num_clips": budget.num_clips}
    return {**describe_pretraining(start, budget), "head": head}


@contextlib.contextmanager
def measure(result: dict[str, Any]):
    """Note the seconds of processor time that the block took."""
    started = time.process_time()
    yield
    result["cpu_seconds"] = round(time.process_time() - started, 1)


def finish_run(output: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, which says that the run is done."""
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def train_teacher(folder: Path, max_steps: int) -> None:
    """The tiny CLIP of `make demo`, unless it is there."""
    from umt_hf.moving_shapes import tiny_clip as teacher

    if not (folder / "teacher" / "config.json").is_file():
        data, output = str(folder / "data"), str(folder / "teacher")
        teacher.train_teacher(teacher.TeacherArguments(data=data, output_dir=output, max_steps=max_steps))


def pretrain(folder: Path, seed: int, start: str, budget: Budget) -> None:
    """Weights of a start: drawn, and then pre-trained as its name says."""
    from umt_hf.training import stage1

    output = folder / "finetune" / f"seed_{seed}" / start
    if (result := start_run(output, **describe_pretraining(start, budget))) is None:
        return
    with measure(result):
        scratch = output / "scratch" if start != "scratch" else output
        build_student(seed).save_pretrained(scratch)
        flags = {
            "train_data": folder / "finetune" / "frames" / "train_motion.csv",
            "teacher_name_or_path": folder / "teacher",
            "num_aligned_layers": 1,
            "mask_type": MASK_TYPES.get(start, "tube"),
            "mask_ratio": MASK_RATIO,
            "model_name_or_path": scratch,
            "output_dir": output,
            "max_steps": budget.pretraining_steps,
            "seed": seed,
            **PRETRAINING,
        }
        if start in MASK_TYPES:
            stage1.main(list_flags(flags))
        elif start == "pixel":
            reconstruct_pixels(list_flags(flags))
    finish_run(output, result)


def build_student(seed: int) -> Any:
    """An encoder with fresh weights, the same for every start of a seed."""
    from umt_hf import UMTVideoConfig, UMTVideoModel

    torch.manual_seed(seed)
    return UMTVideoModel(
        UMTVideoConfig(
            **STUDENT,
            initializer_range=INITIALIZER_RANGE,
            position_embedding_frames=STUDENT["num_frames"],
            position_embedding_image_size=STUDENT["image_size"],
        )
    )


def reconstruct_pixels(flags: list[str]) -> None:
    """Pre-train the encoder as VideoMAE does: no teacher, tube masks, a decoder, normalised pixels as targets.

    Clips, order, optimizer and schedule are stage 1's own; only the loss and what is exported differ.
    """
    from transformers import VideoMAEForPreTraining

    from umt_hf import UMTVideoModel, UMTVideoProcessor
    from umt_hf.modeling.masking_umt_video import sample_tube_mask
    from umt_hf.runs.config import dump_config, parse_config
    from umt_hf.training import stage1
    from umt_hf.training.alignment import build_grid
    from umt_hf.training.checkpointing import export_run
    from umt_hf.training.trainer import build_accelerator, build_schedule, train

    class PixelStage(stage1.Stage1):
        def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            grid, noise = build_grid(self.config), batch["mask_noise"]
            shape = (len(noise), grid.num_frames, grid.patches_per_frame)
            mask = sample_tube_mask(*shape, MASK_RATIO, noise=noise[:, : grid.patches_per_frame])
            return {"pixel_loss": self.model(batch["pixel_values"], bool_masked_pos=mask).loss}

        def export(self, accelerator: Any, folder: Path) -> None:
            videomae: VideoMAEForPreTraining = accelerator.unwrap_model(self.model)
            encoder = take_encoder(videomae, UMTVideoModel(student.config))
            processor = UMTVideoProcessor.from_model_config(student.config)
            export_run(accelerator, encoder, processor, dump_config(self.resolved), folder)

    parsed = parse_config(stage1.SECTIONS, flags)
    model, _, _, data, training = parsed
    accelerator = build_accelerator(training)
    student = UMTVideoModel.from_pretrained(model.model_name_or_path)
    student.config.use_final_norm = False
    resolved = dict(zip(stage1.SECTIONS, parsed, strict=True))
    stage = PixelStage(build_videomae(student), None, data, training, stage1.load_tables(data), resolved)
    train(stage, training, accelerator, build_schedule(training, None, 1), data.max_skipped_ratio)


def build_videomae(student: Any) -> Any:
    """Transformers' VideoMAE whose encoder is `student`, with a decoder of half the width and half the layers."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = student.config
    names = (*STUDENT, "layer_norm_eps", "initializer_range", "tubelet_size")
    videomae = VideoMAEForPreTraining(
        VideoMAEConfig(
            **{name: getattr(config, name) for name in names},
            decoder_hidden_size=config.hidden_size // 2,
            decoder_num_hidden_layers=config.num_hidden_layers // 2,
            decoder_num_attention_heads=max(config.num_attention_heads // 2, 1),
            decoder_intermediate_size=config.intermediate_size // 2,
        )
    )
    encoder = videomae.videomae.state_dict()
    for name, tensor in student.state_dict().items():
        if not name.startswith("norm."):  # VideoMAE's encoder has none
            theirs = name_in_videomae(name, encoder)
            encoder[theirs] = tensor.view(encoder[theirs].shape)
    videomae.videomae.load_state_dict(encoder)
    return videomae


def take_encoder(videomae: Any, student: Any) -> Any:
    """Carry the weights of a VideoMAE's encoder over to `student`, an encoder of ours without a final norm."""
    encoder = videomae.videomae.state_dict()
    state = {
        name: encoder[name_in_videomae(name, encoder)].view(old.shape) for name, old in student.state_dict().items()
    }
    student.load_state_dict(state)
    return student


def name_in_videomae(name: str, target: dict[str, torch.Tensor]) -> str:
    """What VideoMAE's encoder calls a weight of ours."""
    renames = {
        "layers.": "encoder.layer.",
        "attention.q_proj.": "attention.attention.query.",
        "attention.k_proj.": "attention.attention.key.",
        "attention.v_proj.": "attention.attention.value.",
        "attention.o_proj.": "attention.output.dense.",
        "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.",
    }
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs)
    if name not in target:  # before Transformers 5.23
        name = name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
    return name


def fit_heads(folder: Path, seed: int, start: str, budget: Budget) -> None:
    """Fit a head on the frozen encoder for each task and amount of data: an MLP on one mean a frame in time order."""
    from umt_hf import UMTVideoModel, UMTVideoProcessor

    output = folder / "finetune" / f"seed_{seed}" / f"{start}_heads"
    if (result := start_run(output, **describe_heads(start, budget))) is None:
        return
    encoder = UMTVideoModel.from_pretrained(output.parent / start, use_final_norm=False).eval()
    processor = UMTVideoProcessor.from_model_config(encoder.config)

    pooling = FrameOrderPooling(encoder.config.num_frames)

    @torch.no_grad()
    def embed_clips(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"frames": pooling(encoder(pixel_values).last_hidden_state)}

    with measure(result):
        frames = folder / "finetune" / "frames"
        test = embed_split(frames, "test", processor, embed_clips)
        for data, split in SPLITS.items():
            if data == "low" and start not in LOW_DATA_STARTS:
                continue
            train = embed_split(frames, split, processor, embed_clips)
            for task, num_classes in TASKS.items():
                head = fit_head(train["frames"], train[task], num_classes, budget.head_steps, seed)
                with torch.no_grad():
                    is_right = head(test["frames"]).argmax(1) == test[task]
                result[f"{task}_{data}"] = is_right.float().mean().item()
                torch.save(head.state_dict(), output / f"{task}_{data}.pt")
    finish_run(output, result)


class FrameOrderPooling(torch.nn.Module):
    """One mean a frame, in time order."""

    def __init__(self, num_frames: int):
        super().__init__()
        self.num_frames = num_frames

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, T * D)`."""
        return tokens.unflatten(1, (self.num_frames, -1)).mean(2).flatten(1)


class Standardize(torch.nn.Module):
    """Shift and scale features to a mean and spread that were measured on frozen ones."""

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, num_features)` to the same shape."""
        return (features - self.mean) / self.std


def build_head(num_features: int, num_classes: int) -> torch.nn.Sequential:
    """The MLP of `make demo` on standardised features."""
    return torch.nn.Sequential(Standardize(num_features), build_mlp(num_features, num_classes))


def fit_head(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, max_steps: int, seed: int
) -> torch.nn.Sequential:
    """Fit a head on frozen features `(clips, T * D)`; nothing is chosen by held-out clips."""
    torch.manual_seed(seed)
    head = build_head(features.shape[1], num_classes)
    head[0].mean.copy_(features.mean(0))
    head[0].std.copy_(features.std(0) + 1e-6)
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD["learning_rate"], weight_decay=HEAD["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for _ in range(max_steps):
        batch = torch.randint(len(features), (HEAD["batch_size"],))
        loss = torch.nn.functional.cross_entropy(head(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def replace_head(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Give a classifier a fitted head, in place of the mean over all tokens that makes frames forget their order."""
    config = model.config
    head = build_head(config.hidden_size * config.num_frames, config.num_labels)
    head.load_state_dict(state)
    model.attentive_pooling = FrameOrderPooling(config.num_frames)
    model.fc_norm, model.classifier = head.to(model.device)


def fine_tune(folder: Path, seed: int, start: str, task: str, data: str, budget: Budget) -> None:
    """Train a start with its fitted head: accuracy on a fixed held-out subset as it goes, then on the test clips.

    Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022 (the head first, then everything).
    """
    from umt_hf.data.sources import load_videos
    from umt_hf.finetuning import classification as finetune_classification
    from umt_hf.runs.config import parse_config

    output = folder / "finetune" / f"seed_{seed}" / f"{start}_{task}_{data}"
    max_steps = budget.finetuning_steps if data == "full" else budget.low_data_steps
    eval_steps = max(max_steps // budget.num_curve_points, 1)
    own = {"max_steps": max_steps, "eval_steps": eval_steps, **FINETUNING}
    clips = {"curve": budget.num_curve_clips, "corrupted": budget.num_corrupted_clips}
    if (result := start_run(output, **describe_heads(start, budget), finetuning=own, clips=clips)) is None:
        return
    frames = folder / "finetune" / "frames"
    flags = {
        "model_name_or_path": output.parent / start,
        "train_data": frames / f"{SPLITS[data]}_{task}.csv",
        "validation_data": frames / f"curve_{task}.csv",
        "test_data": frames / f"test_{task}.csv",
        "output_dir": output,
        "num_classes": TASKS[task],
        "seed": seed,
        **own,
    }
    parsed = parse_config(finetune_classification.SECTIONS, list_flags(flags))
    trainer = finetune_classification.build_trainer(*parsed)
    replace_head(trainer.model, torch.load(output.parent / f"{start}_heads" / f"{task}_{data}.pt"))
    with measure(result):
        trainer.train()
    result["curve"] = [
        (line["step"], line["eval_top1_accuracy"])
        for line in trainer.state.log_history
        if "eval_top1_accuracy" in line
    ]
    result["test"] = trainer.evaluate(metric_key_prefix="test")["test_top1_accuracy"]
    if data == "full" and start in CORRUPTED_STARTS:
        names = {"intact": "test_intact"} | {name: f"test_{name}_{SEVERITY}" for name in CORRUPTIONS}
        result["corrupted"] = {}
        for name, split in names.items():
            table = load_videos(str(frames / f"{split}_{task}.csv"))
            test = finetune_classification.build_test(table, trainer.processing_class, parsed[0], parsed[2])
            result["corrupted"][name] = test(trainer.model, trainer.accelerator)["top1_accuracy"]
    finish_run(output, result)


def list_flags(flags: dict[str, Any]) -> list[str]:
    """Command line of a script."""
    arguments = []
    for name, value in flags.items():
        arguments += [f"--{name}", *(str(part) for part in (value if isinstance(value, tuple) else (value,)))]
    return arguments


def report(folder: Path, seeds: Sequence[int], budget: Budget) -> None:
    """Print the tables, write them to `tables.md`, and draw `accuracy.png`."""
    from umt_hf.plots import AccuracyPanel, plot_accuracy

    names = [name.partition("/")[2] for name in plan_jobs(folder.parent, seeds[:1], budget) if name != "teacher"]
    results = {
        name: [json.loads((folder / f"seed_{seed}" / name / "result.json").read_text()) for seed in seeds]
        for name in names
    }
    parts = [format_results(results, "full"), format_results(results, "low"), format_corrupted(results)]
    tables = "\n\n".join(parts) + "\n"
    print(tables)
    (folder / "tables.md").write_text(tables)
    panels = []
    sizes = {
        data: len((folder / "frames" / f"{split}_motion.csv").read_text().splitlines())
        for data, split in SPLITS.items()
    }
    for data in SPLITS:
        for task, num_classes in TASKS.items():
            curves = {
                STARTS[start]: [result["curve"] for result in results[f"{start}_{task}_{data}"]]
                for start in STARTS
                if f"{start}_{task}_{data}" in results
            }
            panels.append(AccuracyPanel(f"{task}, {sizes[data]} training clips", curves, 1 / num_classes))
    plot_accuracy(panels, folder / "accuracy.png")
    print(f"Tables:  {folder / 'tables.md'}\nPicture: {folder / 'accuracy.png'}")


def format_results(results: dict[str, list[dict]], data: str) -> str:
    """Test accuracy of every start on both tasks, with the encoder frozen and fine-tuned, and what it cost."""
    title = {"full": "all training clips", "low": "a tenth of them"}[data]
    header = [title, "pre-training, CPU seconds"]
    header += [f"{task}, {state}" for task in TASKS for state in ("frozen", "fine-tuned")]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --- |" * (len(header) - 1)]
    for start in STARTS if data == "full" else LOW_DATA_STARTS:
        seconds = [run["cpu_seconds"] for run in results[start]]
        cells = [STARTS[start], "0" if start == "scratch" else format_spread(seconds, 0)]
        for task in TASKS:
            name = f"{task}_{data}"
            cells.append(format_spread([run[name] for run in results[f"{start}_heads"]]))
            cells.append(format_spread([run["test"] for run in results[f"{start}_{name}"]]))
        lines.append(f"| {' | '.join(cells)} |")
    chance = [f"{1 / num_classes:.3f}" for num_classes in TASKS.values() for _ in range(2)]
    return "\n".join([*lines, f"| chance |  | {' | '.join(chance)} |"])


def format_corrupted(results: dict[str, list[dict]]) -> str:
    """Accuracy on corrupted test clips."""
    names = ["intact", *CORRUPTIONS]
    header = [f"fine-tuned on all clips; {SEVERITY} corruption", *(name.replace("_", " ") for name in names)]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --- |" * len(names)]
    for task in TASKS:
        for start in CORRUPTED_STARTS:
            runs = [run["corrupted"] for run in results[f"{start}_{task}_full"]]
            cells = [format_spread([run[name] for run in runs]) for name in names]
            lines.append(f"| {task}, {STARTS[start]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several seeds, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
