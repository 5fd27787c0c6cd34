"""What libraries say on a normal run and a user can do nothing about, left out remark by remark.

Everything else that they say is shown. Imports nothing but the standard library, so that it can be imported first: to
import this module is to leave out what torchao and bitsandbytes remark when Transformers and PEFT import them.
"""

import contextlib
import logging
import warnings
from collections.abc import Generator

# Logger -> part of a message of it. Here a part of the quantization extra is too old or too new for another.
IMPORT_REMARKS = {
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Of operations that no model here has, at an export to ONNX.
    "torch.onnx._internal.exporter._registration": "Failed to infer the signature for function",
}
# Weights that share memory are stored once, and every export is compared with the model's weights.
RUN_REMARKS = {"accelerate.utils.other": "Removed shared tensor"}
LOADING_LOGGER = "transformers.modeling_utils"
LOADING_REMARKS = ("LOAD REPORT", "This checkpoint seem corrupted. The tied weights mapping")
# Beginnings of warnings; of a loader that copies nothing to a GPU, and of one with more workers than cores.
WARNINGS = ("'pin_memory' argument is set as true", "This DataLoader will create")
# They log each request to a server at the level of a script's own lines.
CHATTY = ("httpx", "httpx2", "huggingface_hub.utils._http")
# What one process alone can know, and all say.
SAID_BY_ALL = ("umt_hf.data.unreadable",)
# Rows from which on the reading of a table takes seconds.
MANY_ROWS = 20_000


class _Without(logging.Filter):
    """Lets a record pass unless its message has one of some parts."""

    def __init__(self, *parts: str):
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self.parts)


def _speaks_for_all(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.startswith(SAID_BY_ALL)


for _name, _part in IMPORT_REMARKS.items():
    logging.getLogger(_name).addFilter(_Without(_part))


@contextlib.contextmanager
def leave_out_load_report() -> Generator[None]:
    """Leave out Transformers' table of weights that are missing, left over or of another shape.

    For those who ask for the names, and say or refuse what is not as it should be.
    """
    logger, without = logging.getLogger(LOADING_LOGGER), _Without(*LOADING_REMARKS)
    logger.addFilter(without)
    try:
        yield
    finally:
        logger.removeFilter(without)


@contextlib.contextmanager
def quiet_libraries(rank: int = 0, verbosity: int | None = None) -> Generator[None]:
    """Leave out the remarks and bars of libraries while a script or command runs, and all of other processes.

    Args:
        rank: Number of this process; any but the first says only what it alone can know, and errors.
        verbosity: Level from which on Transformers speaks; default: its own, errors in other processes.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    if verbosity is None and rank > 0:
        verbosity = logging.ERROR
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        for name, part in RUN_REMARKS.items():
            _add_filter(stack, logging.getLogger(name), _Without(part))
        for name in (*CHATTY, "accelerate"):  # which says of each file of a checkpoint that it was written
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        if verbosity is not None:
            stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
            transformers_logging.set_verbosity(verbosity)
        if rank > 0:
            warnings.simplefilter("ignore")
            stack.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
            datasets.logging.set_verbosity_error()
            for handler in logging.getLogger().handlers:
                _add_filter(stack, handler, _speaks_for_all)
        # Loading and writing weights, and small tables, take less than a second each.
        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


def _add_filter(stack: contextlib.ExitStack, owner: logging.Filterer, added: "logging._FilterType") -> None:
    owner.addFilter(added)
    stack.callback(owner.removeFilter, added)


@contextlib.contextmanager
def show_bar(num_rows: int, rank: int = 0) -> Generator[None]:
    """Show the bar of `datasets` after all, in the main process, where a table has many rows.

    Args:
        num_rows: Rows to be read.
        rank: Number of this process.
    """
    import datasets

    is_shown = datasets.are_progress_bars_disabled() and num_rows >= MANY_ROWS and rank == 0
    if is_shown:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        if is_shown:
            datasets.disable_progress_bars()
