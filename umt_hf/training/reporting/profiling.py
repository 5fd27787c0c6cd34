"""A profile of a few steps, as `--profile` asks for."""

import logging
from pathlib import Path
from types import TracebackType

from torch import profiler

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
STEPS_BEFORE = 4  # the first ones are not like the others
STEPS_OF_WARMUP = 1
STEPS_PROFILED = 3


class StepProfiler:
    """Writes a trace of some steps of the main process, which Chrome, Perfetto and TensorBoard open.

    Args:
        output_dir: Of the run; the trace goes to `profile/` in it.
        is_active: Whether this process is to be profiled.
        first_step: Step that the run goes on from.
        total_steps: Steps of the run.

    Raises:
        ValueError: If the run has too few steps left.
    """

    def __init__(self, output_dir: Path, is_active: bool, first_step: int, total_steps: int):
        self.folder = output_dir / PROFILE_FOLDER
        self.first_step = first_step + STEPS_BEFORE + STEPS_OF_WARMUP + 1
        self.profile: profiler.profile | None = None
        needed = STEPS_BEFORE + STEPS_OF_WARMUP + STEPS_PROFILED
        if not is_active:
            return
        if total_steps - first_step < needed:
            raise ValueError(
                f"--profile needs {needed} steps, and the run has {total_steps - first_step} left: raise max_steps or "
                "the epochs, or leave it out."
            )
        self.profile = profiler.profile(
            schedule=profiler.schedule(wait=STEPS_BEFORE, warmup=STEPS_OF_WARMUP, active=STEPS_PROFILED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )

    def __enter__(self) -> "StepProfiler":
        if self.profile is not None:
            self.profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.profile = None

    def finish_step(self) -> None:
        """Go on to the next step; all is written after the last one of the trace."""
        if self.profile is not None:
            self.profile.step()

    def _write(self, profile: profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps-{self.first_step}-{self.first_step + STEPS_PROFILED - 1}.json"
        profile.export_chrome_trace(str(path))
        logger.info("Wrote a profile of %d steps to %s.", STEPS_PROFILED, path)
        self.profile = None
