"""The one loop that both pre-training stages share: order, counting, logging and saving.

A stage supplies the model, its data and `forward_step(batch) -> losses by name`; Accelerate supplies devices,
precision, gradient accumulation, distribution and state.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    RNG_STATE_NAME,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    set_seed,
)
from torch import nn

from ..data.lists.fingerprints import Fingerprint, describe_changes, fingerprint_rows
from ..data.unreadable import UnreadableList, UnreadableVideos, say_unreadable
from ..runs.config import flatten_recipe, require
from ..runs.disk import write_text
from ..runs.folder import COUNTERS_FILE, CURE_OF_DAMAGE, RECIPE_FILE, STATE_FOLDER, UNREADABLE_FILE, read_run_json
from ..runs.mistakes import UserError, naming_full_disk
from .arguments import PretrainingArguments
from .background_push import build_hub_push
from .checkpointing import (
    choose_checkpoint,
    list_checkpoints,
    refuse_nonfinite_weights,
    remove_surplus,
    remove_unfinished,
    require_same_model,
    save_checkpoint,
    set_aside_later,
)
from .interruption import Preemption, named_silence
from .optimization import Schedule, build_optimizer, keep_group_settings, scale_learning_rate
from .order import Position, RunShape, measure_epoch
from .reporting.flops import FlopMeter, find_peak_tflops
from .reporting.metric_meter import MetricMeter
from .reporting.profiling import StepProfiler
from .reporting.rates import StepClock
from .reporting.run_log import RunLog
from .sharding import gathered_model, refuse_silent_ddp, settle_deepspeed
from .step.compilation import choose_compilation, compile_stage, uncompiled
from .step.guard import NonfiniteSteps, StepGuard
from .step.update import run_micro_batch, with_total

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
    "allow_schedule_change",
    "profile",
    "peak_tflops",
}
SHAPE_SETTINGS = {"per_device_train_batch_size", "gradient_accumulation_steps", "batch_sizes"}  # see `RunShape`
FREE_BEGINNINGS = ("dataloader_", "log", "save_", "hub_", "ddp_", "preemption_")


class Stage(Protocol):
    """What a stage gives to the loop."""

    model: nn.Module

    compute_targets: Callable[..., tuple[torch.Tensor, ...]]  # the teacher's part of a step; may be compiled

    batch_sizes: list[int]  # videos that a process takes at a time, for each kind of batch

    named_tables: dict[str, Any]  # rows of each corpus, by its name

    table_lengths: list[int] | None  # rows for each kind of batch; `None` = streamed

    def build_batches(self, accelerator: Accelerator, position: Position | None) -> Iterable[dict[str, Any]]:
        """Endless training batches of this process from a position on, each with the `position` after its step."""

    def forward_step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Weighted losses by name; calls `self.model(...)`, so that the hooks of DDP and FSDP run."""

    def monitor(self) -> dict[str, float]:
        """Further values for the log, such as a learned temperature."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures on the held-out data, named `eval_...`; empty without such data. Called in all processes."""

    def export(self, accelerator: Accelerator, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads; called in all processes."""


def limit_nonfinite_steps(max_nonfinite_steps: int, total_steps: int, has_scaler: bool) -> int:
    """Bad steps in a row that a run may have.

    A short run may not end in nothing but bad steps. The loss scaler of fp16 skips a few first ones as it should.
    """
    return max_nonfinite_steps if has_scaler else min(max_nonfinite_steps, total_steps // 2)


@dataclass
class TrainState(UnreadableVideos, NonfiniteSteps):
    """Counters of a run, saved with it; those of its videos included.

    Args:
        step: Optimizer steps taken.
        position: Where it is in its data; `None` = at the beginning.
        shape: How it is laid out.
        data: What stands for the rows of each corpus; empty = not known.
    """

    step: int = 0
    position: Position | None = None
    shape: RunShape | None = None
    data: list[Fingerprint] = field(default_factory=list)

    def sum_up(self, accelerator: Accelerator) -> "TrainState":
        """The counters of the run, with the videos of all processes; called in all of them."""
        counts = torch.tensor([self.videos, self.skipped_videos], device=accelerator.device)
        videos, skipped = accelerator.reduce(counts, reduction="sum").tolist()
        return replace(self, videos=videos, skipped_videos=skipped)

    def take_share(self, process_index: int, num_processes: int) -> None:
        """Keep a part of the videos of a run, so that all processes together have them all."""
        for name in ("videos", "skipped_videos"):
            share, rest = divmod(getattr(self, name), num_processes)
            setattr(self, name, share + (process_index < rest))

    def save(self, folder: Path) -> None:
        """Write the counters of the run into the folder of a checkpoint's state."""
        write_text(folder / COUNTERS_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read them again.

        Raises:
            FileNotFoundError: If the checkpoint is from a version that kept them otherwise.
        """
        file = folder / COUNTERS_FILE
        values = read_run_json(file) if file.is_file() else {}
        if not {"position", "shape"} <= values.keys():
            missing = "position in the data" if values else COUNTERS_FILE
            raise FileNotFoundError(
                f"{folder} has no {missing}: it is from an older version; start anew from {folder.parent}, which is a "
                "model folder, with `--model_name_or_path`."
            )
        for name, value in values.items():
            setattr(self, name, value)
        self.shape = RunShape(**values["shape"])


def build_accelerator(args: PretrainingArguments, find_unused_parameters: bool = False) -> Accelerator:
    """Accelerator of a pre-training run; distribution, and precision unless set, come from the launcher.

    Args:
        args: Precision, accumulation and tracker.
        find_unused_parameters: Whether a step may leave parameters without gradient.
    """
    set_seed(args.seed)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # Batches are planned over epoch ends, so accumulation never is cut short by the loader's.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=find_unused_parameters,
                broadcast_buffers=False,  # they are tables of positions, alike everywhere
                gradient_as_bucket_view=True,
            ),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout_seconds)),
        ],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
    )
    refuse_silent_ddp(accelerator)
    settle_deepspeed(accelerator, args.per_device_train_batch_size, args.max_grad_norm)
    return accelerator


def build_schedule(
    args: PretrainingArguments, steps_per_epoch: float | None, num_processes: int, repeated_augmentation: int = 1
) -> Schedule:
    """Steps and rates of a run, by the published rules.

    Args:
        args: Epochs or steps, rates, batch size.
        steps_per_epoch: Optimizer steps per epoch; `None` for streamed data.
        num_processes: Processes.
        repeated_augmentation: Clips made of each video.

    Raises:
        ValueError: If a length is given in epochs and the data has none, or the run comes out without steps.
    """

    def count_steps(name: str, steps: int, epochs: float) -> int:
        if steps >= 0:
            return steps
        if steps_per_epoch is None:
            raise ValueError(f"Streamed data has no known length: set {name}_steps instead of epochs.")
        # Rounded down, as published.
        return int(epochs * steps_per_epoch)

    scale = 1.0
    if args.scale_learning_rate:
        total = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
        scale = scale_learning_rate(1.0, total, repeated_augmentation)
    total_steps = count_steps("max", args.max_steps, args.num_train_epochs)
    if total_steps < 1:
        raise ValueError(
            f"The run has no steps: {steps_per_epoch} per epoch and num_train_epochs={args.num_train_epochs}. Raise "
            "epochs, or lower the batch or gradient_accumulation_steps."
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
        Terminated: After SIGTERM, when a checkpoint was saved.
        UserError: If another process does not answer.
        ValueError: If weights are not finite, before the first step or after the last, or the checkpoint is damaged.
        PublishingError: If the run is to be pushed and nobody is logged in; raised before the first step.
    """
    if accelerator.is_main_process:
        remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    list_needed = functools.partial(list_random_states, num_processes=accelerator.num_processes)
    checkpoint = choose_checkpoint(args.resume_from_checkpoint, args.output_dir, list_needed=list_needed)
    if checkpoint is not None:
        require_same_model(checkpoint, stage.model)
    set_seed(args.seed, device_specific=True)  # the weights were drawn alike everywhere; dropout is not to be
    optimizer = build_optimizer(stage.model, args, schedule.peak, accelerator.device)
    compile_stage(stage, choose_compilation(args, accelerator))
    stage.model, optimizer = accelerator.prepare(stage.model, optimizer)
    shape = RunShape(
        accelerator.num_processes, args.gradient_accumulation_steps, stage.batch_sizes, schedule.total_steps
    )
    state = TrainState(shape=shape)
    present = (
        {name: fingerprint_rows(rows) for name, rows in stage.named_tables.items()}
        if accelerator.is_main_process
        else {}
    )
    if checkpoint is not None:
        _resume(checkpoint, accelerator, optimizer, state, args.allow_schedule_change, run_config or {})
        warn_of_other_rows(state.data, present)
    state.data = list(present.values())
    refuse_nonfinite_weights(stage.model, accelerator, str(checkpoint or "The model to start from"))
    if checkpoint is not None:
        set_aside_later(args.output_dir, state.step)
        if accelerator.is_main_process:  # a kill may have come between the last save and the deletion
            remove_surplus(args.output_dir, args.save_total_limit, checkpoint)
    limit = limit_nonfinite_steps(
        args.max_nonfinite_steps, schedule.total_steps, has_scaler=accelerator.scaler is not None
    )
    guard = StepGuard(state, limit)
    keeper = RunKeeper(stage, args, accelerator, state, schedule.total_steps, guard, run_config or {})
    stage.model.train()
    is_over = state.step >= schedule.total_steps  # a finished run that is started again is only exported anew
    preemption = Preemption(accelerator, args.preemption_signal, args.preemption_exit_code, args.ddp_timeout_seconds)
    profiler = StepProfiler(
        keeper.output_dir,
        args.profile and accelerator.is_main_process and not is_over,
        state.step,
        schedule.total_steps,
    )
    with keeper.log, preemption, named_silence(accelerator, state), profiler:
        # Inline, so that the loader's workers end with the loop, and not after the last upload.
        for batch in keeper.clock.watch([] if is_over else stage.build_batches(accelerator, state.position)):
            if not _take_batch(batch, stage, accelerator, optimizer, schedule, keeper, max_skipped_ratio):
                continue
            profiler.finish_step()
            if state.step >= schedule.total_steps:
                break
            if preemption.is_asked():
                keeper.save()
                preemption.end()
    with keeper.log:
        keeper.finish_run(is_tested=not is_over)
    return state


def _take_batch(
    batch: dict[str, Any],
    stage: Stage,
    accelerator: Accelerator,
    optimizer: Any,
    schedule: Schedule,
    keeper: "RunKeeper",
    max_skipped_ratio: float,
) -> bool:
    """Train on a batch; `True` where it ends a step."""
    state = keeper.state
    position = batch.pop("position")
    failures = batch.pop("failures", [])
    count_videos(state, failures, batch.pop("num_videos"), max_skipped_ratio, keeper.unreadable)
    flops = keeper.measure_flops(batch)
    learning_rate = schedule(state.step)
    done = run_micro_batch(stage, accelerator, optimizer, batch, learning_rate, keeper.args.max_grad_norm)
    if done.norm is not None and done.is_bad is not None:
        keeper.guard.add(state.step, done.is_bad)
        keeper.meter.update({"grad_norm": done.norm})
    keeper.count(done.losses, len(batch["pixel_values"]), flops)
    if not accelerator.sync_gradients:
        return False
    state.step, state.position = state.step + 1, position
    keeper.finish_step(learning_rate)
    return True


class RunKeeper:
    """Logs, saves, tests and pushes a run at the steps that its arguments name.

    Args:
        stage: Model and held-out data, on the device.
        args: When to log, save and test.
        accelerator: Of the run; all processes build one and call its methods alike.
        state: Counters, which the loop moves on.
        total_steps: Steps of the run.
        guard: Knows of steps whose gradients were not finite.
        run_config: Recorded by the tracker.
    """

    def __init__(
        self,
        stage: Stage,
        args: PretrainingArguments,
        accelerator: Accelerator,
        state: TrainState,
        total_steps: int,
        guard: StepGuard,
        run_config: dict[str, Any],
    ):
        self.stage, self.args, self.accelerator, self.state = stage, args, accelerator, state
        self.total_steps, self.guard = total_steps, guard
        self.saved_step: int | None = None
        self.output_dir = Path(args.output_dir)
        peak = find_peak_tflops(accelerator.device, accelerator.mixed_precision, args.peak_tflops)
        self.meter, self.clock = MetricMeter(accelerator), StepClock(accelerator, peak)
        self.flops = None if peak is None else FlopMeter(stage.model, stage.forward_step, accelerator)
        self.log = RunLog(accelerator, self.output_dir, state.step, total_steps, run_config, args.disable_tqdm)
        self.unreadable = UnreadableList(self.output_dir / UNREADABLE_FILE)
        self.hub = build_hub_push(args, list_checkpoints, accelerator.is_main_process)

    def measure_flops(self, batch: dict[str, Any]) -> tuple[int, int] | None:
        """Operations of student and teacher for a micro-batch; `None` where no share of a peak is logged."""
        if self.flops is None:
            return None
        with self.clock.paused():
            return self.flops.measure(batch)

    def count(self, losses: dict[str, torch.Tensor], num_clips: int, flops: tuple[int, int] | None) -> None:
        """Add a micro-batch of this process to the averages."""
        self.meter.update(losses)
        self.clock.count(num_clips, flops)

    def finish_step(self, learning_rate: float) -> None:
        """Log, save and test after an optimizer step, where it is due; `finish_run` tests after the last one."""
        step, args = self.state.step, self.args
        is_last = step >= self.total_steps
        self.log.bar.update()
        self.clock.steps += 1
        if step % args.logging_steps == 0 or is_last:
            self.guard.read()
            own_loss = self.meter.read_own("loss")
            values = {**self.meter.flush(), "learning_rate": learning_rate, **self.clock.flush(own_loss)}
            if (epoch := measure_epoch(self.state.position, self.stage.table_lengths)) is not None:
                values["epoch"] = epoch
            values |= self.stage.monitor() | _counts(self.accelerator, self.state)
            self.log.record(step, values)
            self.log.say(step, values)
        if step % args.save_steps == 0 or is_last:
            self.save()  # before anything else can fail
        if not is_last and args.eval_steps > 0 and step % args.eval_steps == 0:
            self._test()

    def finish_run(self, is_tested: bool) -> None:
        """Export the final model, test it, and wait for what still goes up.

        Args:
            is_tested: Whether it is tested: a finished run that is started again has been.
        """
        refuse_nonfinite_weights(self.stage.model, self.accelerator, "The trained model")
        # Before it is tested: a held-out video that cannot be read is not to cost the training.
        with naming_full_disk(self.output_dir):
            self.stage.export(self.accelerator, self.output_dir)
        self.accelerator.wait_for_everyone()
        if is_tested:
            try:
                self._test()
            except (ValueError, UserError) as error:
                raise ValueError(
                    f"{self.output_dir} holds the trained model, but testing it failed: {error}"
                ) from error
        self.log.close()
        if self.hub is not None:
            self.hub.finish()

    def _test(self) -> None:
        with self.clock.paused():
            values = _evaluate(self.stage, self.accelerator, self.args.seed)
        if values:
            self.log.record(self.state.step, values)
            self.log.say_test(self.state.step, values)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_step == self.state.step:
            return
        self.guard.read()  # before it is saved: a run that diverges leaves its last good checkpoint
        self.saved_step = self.state.step
        with self.clock.saving():
            counters = self.state.sum_up(self.accelerator)
            checkpoint = save_checkpoint(
                self.accelerator,
                self.output_dir,
                self.state.step,
                lambda folder: self.stage.export(self.accelerator, folder),
                self.args.save_total_limit,
                counters.save,
            )
        if self.hub is not None:
            self.hub.push_checkpoint(checkpoint)


def _evaluate(stage: Stage, accelerator: Accelerator, seed: int) -> dict[str, float]:
    """Evaluate, and leave no trace in model and random state."""
    # A resumed run does not repeat the evaluation that followed its checkpoint: without the fork its dropout would
    # differ from that of a run that never stopped.
    devices = [accelerator.device] if accelerator.device.type != "cpu" else []
    stage.model.eval()
    forked = torch.random.fork_rng(devices=devices, device_type=accelerator.device.type)
    prepared = stage.model
    with (
        torch.no_grad(),
        forked,
        uncompiled(prepared),
        gathered_model(prepared, accelerator) as stage.model,
    ):
        torch.manual_seed(seed)
        values = stage.evaluate(accelerator)
    stage.model = prepared
    prepared.train()
    return values


def compute_held_out_losses(
    stage: Stage, batches: Iterable[dict[str, Any]], accelerator: Accelerator, unreadable: UnreadableList | None = None
) -> dict[str, float]:
    """Mean losses on held-out batches, named `eval_<loss>`.

    Every clip counts once, whatever the number of processes.

    Args:
        stage: Its `forward_step` is called.
        batches: This process's share of the held-out batches, once through.
        accelerator: Sums over processes.
        unreadable: List of the run, whose entries have been named before.

    Raises:
        UserError: If no video could be read.
    """
    meter = MetricMeter(accelerator)
    for batch in batches:
        say_unreadable(batch.pop("failures"), unreadable, "Held-out video left out: %s")
        if "pixel_values" in batch:
            # By clips, since last batches are smaller.
            meter.update(with_total(stage.forward_step(batch)), len(batch["pixel_values"]))
    if not meter.sums:
        raise UserError("None of the held-out videos could be read; the log above names them.")
    return {f"eval_{name}": value for name, value in meter.flush().items()}


def count_videos(
    videos: UnreadableVideos,
    failures: list[str],
    batch_size: int,
    max_skipped_ratio: float,
    unreadable: UnreadableList | None = None,
) -> None:
    """Count a batch's videos, and name those that could not be read.

    Args:
        videos: Tally of the run.
        failures: A line for each unreadable video.
        batch_size: Videos asked for.
        max_skipped_ratio: Share of unreadable videos past which the run stops.
        unreadable: List of the run, whose entries have been named before.

    Raises:
        RuntimeError: If more of them, and not just a handful, were unreadable.
    """
    # The first batches are too few to judge a share by: one bad video among eight must not stop a run of days.
    videos.count(batch_size, failures, max_skipped_ratio, min_skipped=MIN_SKIPS_TO_STOP, unreadable=unreadable)


def sum_skipped_videos(videos: UnreadableVideos, accelerator: Accelerator) -> int:
    """Unreadable videos of all processes so far; all of them must call it."""
    skipped = torch.tensor(videos.skipped_videos, device=accelerator.device)
    return int(accelerator.reduce(skipped, reduction="sum"))


def _resume(
    checkpoint: Path,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    allow_schedule_change: bool,
    run_config: dict[str, Any],
) -> None:
    present = require(state.shape, "shape")
    state.load(checkpoint / STATE_FOLDER)
    if len(steps := set(gather_object([state.step]))) > 1:
        raise ValueError(
            f"{checkpoint} is at other steps in other processes ({sorted(steps)}): put output_dir on a disk that all "
            "machines share."
        )
    former, state.shape = require(state.shape, "shape"), present
    _compare_shapes(checkpoint, former, present, allow_schedule_change, is_mixed="starts" in (state.position or {}))
    state.take_share(accelerator.process_index, accelerator.num_processes)
    # Rates and decays are those of the arguments, which `run.yaml` records.
    with keep_group_settings(optimizer):
        accelerator.load_state(str(checkpoint / STATE_FOLDER))
    accelerator.step = 0  # of the batches of a step: checkpoints lie between steps
    logger.info("Resuming from %s at step %d.", checkpoint, state.step)
    compared = run_config.keys() - SHAPE_SETTINGS
    settings = read_former_settings(checkpoint)
    warn_of_changes({name: value for name, value in settings.items() if name in compared}, run_config)


def list_random_states(checkpoint: Path, num_processes: int) -> list[str]:
    """Files of random states that a run needs of a checkpoint; Accelerate would go on without them in silence.

    Args:
        checkpoint: Folder of the checkpoint.
        num_processes: Of this run; processes that did not exist when it was written have none.

    Raises:
        ValueError: If its counters are damaged.
    """
    file = checkpoint / STATE_FOLDER / COUNTERS_FILE
    shape = read_run_json(file).get("shape") if file.is_file() else None
    former = shape["num_processes"] if shape else 0  # of an older version, which is refused elsewhere
    return [f"{STATE_FOLDER}/{RNG_STATE_NAME}_{rank}.pkl" for rank in range(min(former, num_processes))]


def _compare_shapes(
    checkpoint: Path, former: RunShape, present: RunShape, allow_schedule_change: bool, is_mixed: bool
) -> None:
    """Say what another layout means for a run that is resumed.

    Raises:
        ValueError: If its schedule has another length, and that is not asked for.
    """
    if former.total_steps != present.total_steps and not allow_schedule_change:
        raise ValueError(
            f"{checkpoint} is from a run of {former.total_steps} steps, and this one has {present.total_steps}: its "
            "learning rate would jump. Set `--max_steps` or the epochs so that the lengths agree, or accept it by "
            "`--allow_schedule_change true`."
        )
    if former.videos_per_step != present.videos_per_step:
        logger.warning(
            "A step takes other numbers of videos than before (%s -> %s): the run goes on with the next videos, and "
            "its losses will not be those of a run that never stopped.",
            former.describe(),
            present.describe(),
        )
    elif former != present:
        logger.info("The steps take the same videos as before: %s -> %s.", former.describe(), present.describe())
    if is_mixed and former.videos_per_batch != present.videos_per_batch:
        logger.warning("Videos and texts are contrasted with those of another number of pairs than before.")
    if is_mixed and former.num_processes != present.num_processes:
        logger.info("Negatives of the matching and masked words are drawn afresh, as the processes are others.")


def read_former_settings(checkpoint: Path) -> dict[str, Any]:
    """Arguments of the run that wrote a checkpoint, as its `run.yaml` has them; empty without one."""
    recipe = checkpoint / RECIPE_FILE
    if not recipe.is_file():
        return {}
    try:
        return flatten_recipe(recipe.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # also bytes that are not text, and cut sections
        raise ValueError(
            f"{recipe} is damaged: it is not a recipe ({' '.join(str(error).split())}). {CURE_OF_DAMAGE}"
        ) from error


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


def warn_of_other_rows(former: list[Fingerprint], present: dict[str, Fingerprint]) -> None:
    """Name, in one warning, training data that are not those of the run that is resumed.

    Args:
        former: As the checkpoint has them; empty = not known, as in checkpoints of older versions.
        present: Name of each corpus -> what stands for its rows; empty where another process speaks.
    """
    if former and present and (changed := describe_changes(former, present)) is not None:
        logger.warning(
            "The training data have changed since the checkpoint was written (%s): the run goes on with other videos "
            "than one that never stopped.",
            changed,
        )


def _counts(accelerator: Accelerator, state: TrainState) -> dict[str, float]:
    return {"skipped_videos": sum_skipped_videos(state, accelerator), "nonfinite_steps": state.nonfinite_steps}
