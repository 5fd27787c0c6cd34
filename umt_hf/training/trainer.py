"""The one loop that both pre-training stages share: order, counting, logging and saving.

A stage supplies the model, its data and `forward_step(batch) -> losses by name`; Accelerate supplies devices,
precision, gradient accumulation, distribution and state.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, set_seed
from torch import nn
from tqdm.auto import tqdm

from ..data.unreadable import UnreadableVideos
from ..runs.config import flatten_recipe
from ..runs.disk import write_text
from ..runs.folder import COUNTERS_FILE, METRICS_FILE, RECIPE_FILE, STATE_FOLDER, MetricLog
from .arguments import PretrainingArguments
from .background_push import build_hub_push
from .checkpointing import (
    find_checkpoint,
    list_checkpoints,
    refuse_nonfinite_weights,
    remove_unfinished,
    save_checkpoint,
)
from .metric_meter import MetricMeter
from .optimization import Schedule, build_parameter_groups, keep_group_settings, scale_learning_rate

logger = logging.getLogger(__name__)

MIN_SKIPS_TO_STOP = 20
# What changes nothing in the course of a run: fields, and beginnings of fields of Transformers.
FREE_TO_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "disable_tqdm",
    "run_name",
    "debug",
}
FREE_BEGINNINGS = ("dataloader_num", "dataloader_pin", "dataloader_pre", "log", "save_", "hub_", "ddp_")


class Stage(Protocol):
    """What a stage gives to the loop."""

    model: nn.Module

    def build_batches(self, accelerator: Accelerator, start: int) -> Iterable[dict[str, Any]]:
        """Endless training batches of this process, from micro-batch `start` on."""

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Weighted losses by name; calls `self.model(...)`, so that the hooks of DDP and FSDP run."""

    def monitor(self) -> dict[str, float]:
        """Further values for the log, such as a learned temperature."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures on the held-out data, named `eval_...`; empty without such data. Called in all processes."""

    def export(self, accelerator: Accelerator, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads; called in all processes."""


@dataclass
class NonfiniteSteps:
    """Steps whose gradients were NaN or infinite: all of them, and the last ones without another between them."""

    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0

    def count_step(self, is_finite: bool, step: int, limit: int) -> None:
        """Count a step.

        Args:
            is_finite: Whether its gradients were; all processes must agree.
            step: Its number.
            limit: Bad steps in a row after which the run stops.

        Raises:
            RuntimeError: If there were more.
        """
        if is_finite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        logger.warning("Step %d skipped: its gradients are not finite.", step)
        if self.nonfinite_in_a_row > limit:
            raise RuntimeError(
                f"{self.nonfinite_in_a_row} steps in a row had NaN or Inf gradients: lower learning_rate, set "
                "max_grad_norm, or use bf16 instead of fp16."
            )


def limit_nonfinite_steps(max_nonfinite_steps: int, total_steps: int, has_scaler: bool) -> int:
    """Bad steps in a row that a run may have.

    A short run may not end in nothing but bad steps. The loss scaler of fp16 skips a few first ones as it should.
    """
    return max_nonfinite_steps if has_scaler else min(max_nonfinite_steps, total_steps // 2)


@dataclass
class TrainState(UnreadableVideos, NonfiniteSteps):
    """Counters of a run, saved with it; those of its videos included."""

    step: int = 0
    micro_step: int = 0

    def save(self, folder: Path) -> None:
        """Write the counters into the folder of a checkpoint's state."""
        write_text(folder / COUNTERS_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read them again.

        Raises:
            FileNotFoundError: If the checkpoint is from a version that pickled them.
        """
        file = folder / COUNTERS_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {COUNTERS_FILE}: it is from an older version; start anew from {folder.parent}, "
                "which is a model folder, with `--model_name_or_path`."
            )
        for name, value in json.loads(file.read_text(encoding="utf-8")).items():
            setattr(self, name, value)


@dataclass
class StepClock:
    """Where the time between two log lines went, in seconds."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    clips: int = 0

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass batches on and add up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def flush(self) -> dict[str, float]:
        """Clips per second and share of time spent waiting for data, since the last call."""
        elapsed = time.perf_counter() - self.started
        rates = {"clips_per_second": self.clips / elapsed, "data_wait_share": self.waited / elapsed}
        self.started, self.waited, self.clips = time.perf_counter(), 0.0, 0
        return rates


def build_accelerator(args: PretrainingArguments, find_unused_parameters: bool = False) -> Accelerator:
    """Accelerator of a pre-training run; distribution, and precision unless set, come from the launcher.

    Args:
        args: Precision, accumulation and tracker.
        find_unused_parameters: Whether a step may leave parameters without gradient.
    """
    set_seed(args.seed)
    return Accelerator(
        mixed_precision=args.mixed_precision,
        # Batches are planned over epoch ends, so accumulation never is cut short by the loader's.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
    )


def build_schedule(
    args: PretrainingArguments, batches_per_epoch: int | None, num_processes: int, repeated_augmentation: int = 1
) -> Schedule:
    """Steps and rates of a run, by the published rules.

    Args:
        args: Epochs or steps, rates, batch size.
        batches_per_epoch: Micro-batches per epoch in each process; `None` for streamed data.
        num_processes: Processes.
        repeated_augmentation: Clips made of each video.

    Raises:
        ValueError: If a length is given in epochs and the data has none, or the run comes out without steps.
    """

    def count_steps(name: str, steps: int, epochs: float) -> int:
        if steps >= 0:
            return steps
        if batches_per_epoch is None:
            raise ValueError(f"Streamed data has no known length: set {name}_steps instead of epochs.")
        # Rounded down, as published.
        return int(epochs * batches_per_epoch / args.gradient_accumulation_steps)

    scale = 1.0
    if args.scale_learning_rate:
        total = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
        scale = scale_learning_rate(1.0, total, repeated_augmentation)
    total_steps = count_steps("max", args.max_steps, args.num_train_epochs)
    if total_steps < 1:
        raise ValueError(
            f"The run has no steps: {batches_per_epoch} batch(es) per epoch, {args.num_train_epochs} epoch(s) and "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}. Raise epochs or lower the batch."
        )
    schedule = Schedule(
        total_steps=total_steps,
        warmup_steps=min(count_steps("warmup", args.warmup_steps, args.warmup_epochs), total_steps),
        peak=args.learning_rate * scale,
        minimum=args.min_learning_rate * scale,
        warmup_start=args.warmup_start_learning_rate * scale,
        kind=args.lr_scheduler_type,
    )
    logger.info("%d steps, %d of them warm-up, peak rate %.3g.", total_steps, schedule.warmup_steps, schedule.peak)
    # The mark of a short run with the warm-up of a long one.
    if schedule.warmup_steps > 0.4 * total_steps:
        logger.warning(
            "Warm-up takes %d of %d steps; lower warmup_epochs or warmup_steps.", schedule.warmup_steps, total_steps
        )
    return schedule


def train(
    stage: Stage,
    args: PretrainingArguments,
    accelerator: Accelerator,
    schedule: Schedule,
    max_skipped_ratio: float,
    run_config: dict[str, Any] | None = None,
) -> TrainState:
    """Run a stage to the schedule's end, or on from a checkpoint.

    Args:
        stage: Model, data and losses.
        args: Optimisation, logging and saving.
        accelerator: From `build_accelerator`.
        schedule: Length and learning rate.
        max_skipped_ratio: Share of unreadable videos past which the run stops.
        run_config: Recorded by the tracker.

    Returns:
        The counters at the end.

    Raises:
        RuntimeError: If too many steps in a row are not finite, or too many videos unreadable.
        ValueError: If weights are not finite, before the first step or after the last.
        PublishingError: If the run is to be pushed and nobody is logged in; raised before the first step.
    """
    if accelerator.is_main_process:
        remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    set_seed(args.seed, device_specific=True)  # the weights were drawn alike everywhere; dropout is not to be
    optimizer = build_optimizer(stage.model, args, schedule.peak, accelerator.device)
    stage.model, optimizer = accelerator.prepare(stage.model, optimizer)
    state = TrainState()
    if checkpoint is not None:
        _resume(checkpoint, accelerator, optimizer, state, run_config or {})
    refuse_nonfinite_weights(stage.model, accelerator, str(checkpoint or "The model to start from"))
    limit = limit_nonfinite_steps(
        args.max_nonfinite_steps, schedule.total_steps, has_scaler=accelerator.scaler is not None
    )
    keeper = RunKeeper(stage, args, accelerator, state, schedule.total_steps, run_config or {})
    stage.model.train()
    is_over = state.step >= schedule.total_steps  # a finished run that is started again is only exported anew
    # Inline, so that the loader's workers end with the loop, and not after the last upload.
    for batch in keeper.clock.watch([] if is_over else stage.build_batches(accelerator, state.micro_step)):
        count_videos(state, batch.pop("failures", []), batch.pop("num_videos"), max_skipped_ratio)
        with accelerator.accumulate(stage.model):
            # Set by hand, since a prepared scheduler would advance once per process.
            learning_rate = schedule(state.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            losses = _with_total(stage.forward_step(batch))
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                _step_if_finite(accelerator, stage.model, optimizer, args.max_grad_norm, state, limit)
                optimizer.zero_grad()
        keeper.count(losses, len(batch["pixel_values"]))
        state.micro_step += 1
        if not accelerator.sync_gradients:
            continue
        state.step += 1
        keeper.finish_step(learning_rate)
        if state.step >= schedule.total_steps:
            break
    keeper.finish_run()
    return state


def build_optimizer(
    model: nn.Module, args: PretrainingArguments, peak: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `build_parameter_groups`, whose `lr_scale` the loop applies."""
    groups = build_parameter_groups(model, args.weight_decay)
    return torch.optim.AdamW(
        [{key: value for key, value in group.items() if key != "names"} for group in groups],
        lr=peak,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
    )


class RunKeeper:
    """Logs, saves, tests and pushes a run at the steps that its arguments name.

    Args:
        stage: Model and held-out data, on the device.
        args: When to log, save and test.
        accelerator: Of the run; all processes build one and call its methods alike.
        state: Counters, which the loop moves on.
        total_steps: Steps of the run.
        run_config: Recorded by the tracker.
    """

    def __init__(
        self,
        stage: Stage,
        args: PretrainingArguments,
        accelerator: Accelerator,
        state: TrainState,
        total_steps: int,
        run_config: dict[str, Any],
    ):
        self.stage, self.args, self.accelerator, self.state = stage, args, accelerator, state
        self.total_steps = total_steps
        self.output_dir = Path(args.output_dir)
        self.meter, self.clock = MetricMeter(accelerator), StepClock()
        self.log = _start_logs(accelerator, self.output_dir, state, run_config)
        self.hub = build_hub_push(args, list_checkpoints, accelerator.is_main_process)
        self.bar = tqdm(
            total=total_steps,
            initial=state.step,
            disable=not accelerator.is_local_main_process,
            desc="pre-training",
            dynamic_ncols=True,
        )

    def count(self, losses: dict[str, torch.Tensor], num_clips: int) -> None:
        """Add a micro-batch of this process to the averages."""
        self.meter.update(losses)
        self.clock.clips += num_clips * self.accelerator.num_processes

    def finish_step(self, learning_rate: float) -> None:
        """Log, save and test after an optimizer step, where it is due; all three are due after the last one."""
        step, args = self.state.step, self.args
        is_last = step >= self.total_steps
        self.bar.update()
        if step % args.logging_steps == 0 or is_last:
            values = {**self.meter.flush(), "learning_rate": learning_rate, **self.clock.flush()}
            self._record(values | self.stage.monitor() | _counts(self.accelerator, self.state))
            self.bar.set_postfix_str(_describe(values, self.state))
        if step % args.save_steps == 0 or is_last:
            self._save()  # before anything else can fail
        is_tested = is_last or (args.eval_steps > 0 and step % args.eval_steps == 0)
        if is_tested and (values := _evaluate(self.stage, self.accelerator, args.seed)):
            self._record(values)
            self.bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def finish_run(self) -> None:
        """Export the final model, and wait for what still goes up."""
        self.bar.close()
        refuse_nonfinite_weights(self.stage.model, self.accelerator, "The trained model")
        self.stage.export(self.accelerator, self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.hub is not None:
            self.hub.finish()

    def _record(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.state.step)
        if self.log is not None:
            self.log.write(self.state.step, values)

    def _save(self) -> None:
        checkpoint = save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.state.step,
            lambda folder: self.stage.export(self.accelerator, folder),
            self.args.save_total_limit,
            self.state.save,
        )
        if self.hub is not None:
            self.hub.push_checkpoint(checkpoint)


def _evaluate(stage: Stage, accelerator: Accelerator, seed: int) -> dict[str, float]:
    """Evaluate, and leave no trace in model and random state."""
    # A resumed run does not repeat the evaluation that followed its checkpoint: without the fork its dropout would
    # differ from that of a run that never stopped.
    devices = [accelerator.device] if accelerator.device.type != "cpu" else []
    stage.model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=accelerator.device.type):
        torch.manual_seed(seed)
        values = stage.evaluate(accelerator)
    stage.model.train()
    return values


def compute_held_out_losses(
    stage: Stage, batches: Iterable[dict[str, Any]], accelerator: Accelerator
) -> dict[str, float]:
    """Mean losses on held-out batches, named `eval_<loss>`.

    Every clip counts once, whatever the number of processes.

    Args:
        stage: Its `forward_step` is called.
        batches: This process's share of the held-out batches, once through.
        accelerator: Sums over processes.

    Raises:
        RuntimeError: If no video could be read.
    """
    meter = MetricMeter(accelerator)
    for batch in batches:
        for failure in batch.pop("failures"):
            logger.warning("Held-out video left out: %s", failure)
        if "pixel_values" in batch:
            # By clips, since last batches are smaller.
            meter.update(_with_total(stage.forward_step(batch)), len(batch["pixel_values"]))
    if not meter.sums:
        raise RuntimeError("None of the held-out videos could be read; the log above names them.")
    return {f"eval_{name}": value for name, value in meter.flush().items()}


def _with_total(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def _step_if_finite(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    max_grad_norm: float | None,
    state: TrainState,
    limit: int,
) -> None:
    """Clip and step, or count the step as skipped if its gradients are not finite (on all processes alike)."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    # An engine that clips by itself (DeepSpeed) may not give its norm; it looks for bad steps by itself, too.
    norm = norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm or 0.0))
    is_finite = bool(torch.isfinite(norm))
    # The loss scaler of fp16 must see every step: it skips bad ones itself and lowers its scale.
    if is_finite or accelerator.scaler is not None:
        optimizer.step()
    state.count_step(is_finite and not accelerator.optimizer_step_was_skipped, state.step, limit)


def count_videos(videos: UnreadableVideos, failures: list[str], batch_size: int, max_skipped_ratio: float) -> None:
    """Count a batch's videos, and name those that could not be read.

    Args:
        videos: Tally of the run.
        failures: A line for each unreadable video.
        batch_size: Videos asked for.
        max_skipped_ratio: Share of unreadable videos past which the run stops.

    Raises:
        RuntimeError: If more of them, and not just a handful, were unreadable.
    """
    # The first batches are too few to judge a share by: one bad video among eight must not stop a run of days.
    videos.count(batch_size, failures, max_skipped_ratio, min_skipped=MIN_SKIPS_TO_STOP)


def sum_skipped_videos(videos: UnreadableVideos, accelerator: Accelerator) -> int:
    """Unreadable videos of all processes so far; all of them must call it."""
    skipped = torch.tensor(videos.skipped_videos, device=accelerator.device)
    return int(accelerator.reduce(skipped, reduction="sum"))


def _start_logs(
    accelerator: Accelerator, output_dir: Path, state: TrainState, run_config: dict[str, Any]
) -> MetricLog | None:
    # TensorBoard refuses lists and None.
    config = {key: value for key, value in run_config.items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers("umt_hf", config=config)
    if not accelerator.is_main_process:
        return None
    # Lines that a killed run wrote after its last checkpoint go: they will be written again.
    return MetricLog(output_dir / METRICS_FILE, state.step)


def _resume(
    checkpoint: Path,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    run_config: dict[str, Any],
) -> None:
    state.load(checkpoint / STATE_FOLDER)
    # Rates and decays are those of the arguments, which `run.yaml` records.
    with keep_group_settings(optimizer):
        accelerator.load_state(str(checkpoint / STATE_FOLDER))
    logger.info("Resuming from %s at step %d.", checkpoint, state.step)
    former = read_former_settings(checkpoint)
    warn_of_changes({name: value for name, value in former.items() if name in run_config}, run_config)


def read_former_settings(checkpoint: Path) -> dict[str, Any]:
    """Arguments of the run that wrote a checkpoint, as its `run.yaml` has them; empty without one."""
    recipe = checkpoint / RECIPE_FILE
    return flatten_recipe(recipe.read_text(encoding="utf-8-sig")) if recipe.is_file() else {}


def warn_of_changes(former: dict[str, Any], present: dict[str, Any]) -> None:
    """Name, in one warning, what is set otherwise than in the run that is resumed.

    Args:
        former: Arguments of that run.
        present: Arguments of this one; those that are not in `former` are left out.
    """
    changed = [
        f"{name} {former[name]} -> {value}"
        for name, value in present.items()
        if name in former
        and former[name] != value
        and name not in FREE_TO_CHANGE
        and not name.startswith(FREE_BEGINNINGS)
    ]
    if changed:
        logger.warning("Resuming with other settings than before: %s.", "; ".join(changed))


def _counts(accelerator: Accelerator, state: TrainState) -> dict[str, float]:
    return {"skipped_videos": sum_skipped_videos(state, accelerator), "nonfinite_steps": state.nonfinite_steps}


def _describe(values: dict[str, float], state: TrainState) -> str:
    return (
        f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, {values['clips_per_second']:.1f} clips/s, "
        f"data wait {values['data_wait_share']:.0%}, {state.skipped_videos} skipped"
    )
