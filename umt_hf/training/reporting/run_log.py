"""What a run says while it trains: a bar, a log line per interval, `metrics.jsonl` and trackers."""

import logging
import sys
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ...runs.folder import METRICS_FILE, MetricLog
from ...runs.scripts import TRACKED_PROJECT

logger = logging.getLogger(__name__)

# Name in the metrics -> how the line says it.
LINE = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "loss_spread": "spread of processes {:.4f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "clips_per_second": "{:.1f} clips/s",
    "step_seconds": "{:.3g} s/step",
    "data_wait_share": "data wait {:.0%}",
    "data_wait_share_max": "slowest process {:.0%}",
    "memory_gib": "{:.2f} GiB",
    "mfu": "MFU {:.1%}",
    "mfu_with_teacher": "with teacher {:.1%}",
    "save_seconds": "save {:.1f} s",
    "skipped_videos": "{:.0f} skipped",
    "nonfinite_steps": "{:.0f} not finite",
}
OF_SEVERAL = ("loss_spread", "data_wait_share_max")  # they say nothing of one process


class RunLog:
    """Bar, log lines, metrics file and trackers of a run; all processes build one, the main one speaks.

    Args:
        accelerator: Of the run; its trackers are started.
        output_dir: Folder of the run.
        step: Step that it goes on from.
        total_steps: Steps of the run.
        run_config: Recorded by the trackers.
        disable_tqdm: Whether there is no bar.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        step: int,
        total_steps: int,
        run_config: dict[str, Any],
        disable_tqdm: bool,
    ):
        self.accelerator, self.total_steps = accelerator, total_steps
        # TensorBoard refuses lists and None.
        config = {key: value for key, value in run_config.items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers(TRACKED_PROJECT, config=config)
        # Lines that a killed run wrote after its last checkpoint go: they will be written again.
        self.file = MetricLog(output_dir / METRICS_FILE, step) if accelerator.is_main_process else None
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            disable=disable_tqdm or not accelerator.is_local_main_process,
            desc="pre-training",
            dynamic_ncols=True,
        )
        self.stack = ExitStack()

    def __enter__(self) -> "RunLog":
        writes = [getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logging.root.handlers]
        if self.accelerator.is_main_process and not self.bar.disable and any(writes):
            # Else a line would stand behind the bar, not above it.
            self.stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.close()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Give values to the trackers and the file, which also gets the time."""
        self.accelerator.log(values, step=step)
        if self.file is not None:
            self.file.write(step, {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **values})

    def say(self, step: int, values: dict[str, float]) -> None:
        """Write an interval's line, and show the same values beside the bar."""
        if self.accelerator.is_main_process:
            logger.info("Step %d of %d: %s", step, self.total_steps, self.describe(values, tuple(LINE)))
        shown = ("loss", "learning_rate", "clips_per_second", "data_wait_share", "skipped_videos")
        self.bar.set_postfix_str(self.describe(values, shown))

    def describe(self, values: dict[str, float], names: tuple[str, ...]) -> str:
        """Values in words, in the order of `names`; those that are not there are left out."""
        several = self.accelerator.num_processes > 1
        return ", ".join(
            LINE[name].format(values[name]) for name in names if name in values and (several or name not in OF_SEVERAL)
        )

    def say_test(self, step: int, values: dict[str, float]) -> None:
        """Write a line with held-out figures."""
        if self.accelerator.is_main_process:
            logger.info("Step %d, held out: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def close(self) -> None:
        """End bar and trackers."""
        self.bar.close()
        self.accelerator.end_training()
