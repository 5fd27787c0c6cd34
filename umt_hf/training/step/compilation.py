"""Student and teacher compiled by `torch.compile`, in place: the names of weights stay the model's own."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from ..arguments import PretrainingArguments

logger = logging.getLogger(__name__)


class CompiledStage(Protocol):
    """What is compiled of a stage."""

    model: nn.Module
    compute_targets: Callable[..., Any]  # the teacher's part of a step


def choose_compilation(args: PretrainingArguments, accelerator: Accelerator) -> dict[str, Any] | None:
    """Arguments of `torch.compile`: those of the run, else those that `accelerate` is configured with.

    Accelerate itself compiles nothing any more: it would wrap the student, change the names of its weights and leave
    out the teacher.

    Args:
        args: Of the run.
        accelerator: Of the run, before anything is prepared.

    Returns:
        `None` where nothing is to be compiled.

    Raises:
        ValueError: If there is no such backend, or the run uses DeepSpeed.
    """
    launcher: Any = accelerator.state.dynamo_plugin
    options: dict[str, Any] = {}
    if launcher.backend != DynamoBackend.NO:
        options = launcher.to_kwargs()
        launcher.backend = DynamoBackend.NO
    elif not args.torch_compile:
        return None
    if args.torch_compile:
        given = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
        options |= {name: value for name, value in given.items() if value is not None}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("torch_compile was not tried with DeepSpeed: train without it, or with ddp or fsdp2.")
    if options.get("mode") == "default":
        del options["mode"]
    # Steps have a fixed shape for each kind of batch: a graph for each one is faster than one for any shape.
    options.setdefault("dynamic", False)
    known = torch.compiler.list_backends(exclude_tags=())
    if options["backend"] not in known:
        raise ValueError(
            f"torch_compile_backend={options['backend']!r} is not a backend of this PyTorch: choose one of "
            f"{', '.join(known)}."
        )
    return options


def compile_stage(stage: CompiledStage, options: dict[str, Any] | None) -> None:
    """Compile the student's forward and the teacher's targets; called before the accelerator prepares the student.

    Args:
        stage: Its `model` is compiled in place and its `compute_targets` replaced.
        options: From `choose_compilation`.
    """
    if options is None:
        return
    # Within the wrapper of DDP, so that its gradients are reduced while others are still computed.
    stage.model.compile(**options)
    compiled = torch.compile(stage.compute_targets, **options)

    def compute_targets(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # with CUDA graphs, results of the step before may be overwritten
        return compiled(*args)

    stage.compute_targets = compute_targets
    logger.info(
        "Student and teacher are compiled (%s): the first step of each kind of batch takes long.",
        ", ".join(f"{name} {value}" for name, value in options.items()),
    )


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """Run a model as it is written, compiled or not: held-out batches have many shapes, not worth a graph each.

    Args:
        model: As the accelerator has prepared it.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
