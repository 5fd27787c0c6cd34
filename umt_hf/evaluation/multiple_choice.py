"""Measure how often the right one of several captions is chosen for a video.

    accelerate launch -m umt_hf.evaluation.multiple_choice --model_name_or_path umt-vit-l16-25m-msrvtt \
        --data msrvtt_mc_test.json --data_root videos --output_dir outputs/msrvtt_mc

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence

from accelerate import Accelerator

from ..data.annotations import load_choices
from ..inference.held_out import group_by_video
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..training.arguments import parse_config
from .choices import MATCHING_SHARE, compute_choice_accuracy, score_choices
from .report import (
    EvaluatedModelArguments,
    EvaluationDataArguments,
    ReportArguments,
    describe_run,
    load_model_and_processor,
    write_report,
)

SECTIONS = {"model": EvaluatedModelArguments, "data": EvaluationDataArguments, "evaluation": ReportArguments}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, choose, measure, report.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        `accuracy`.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    model_args, data, args = parse_config(SECTIONS, sys.argv[1:] if arguments is None else arguments)
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    model, processor = load_model_and_processor(UMTVideoTextForRetrieval, model_args, data)
    choices = load_choices(data.data, **data.source_options())
    scores = score_choices(
        model.to(accelerator.device),
        processor,
        choices,
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_workers=data.dataloader_num_workers,
    )
    metrics = compute_choice_accuracy(scores, choices)
    report = {
        "task": "multiple choice",
        "metrics": metrics,
        "num_videos": len(group_by_video(choices["video"])[0]),
        "num_rows": len(choices),
        "matching_share": MATCHING_SHARE,
        **describe_run(model, processor, accelerator, model_args, data),
        **dataclasses.asdict(args),
    }
    predictions = [
        {"row": row, "answer": max(range(len(s)), key=s.__getitem__), "scores": s} for row, s in enumerate(scores)
    ]
    write_report(accelerator, args.output_dir, report, predictions)
    return metrics


if __name__ == "__main__":
    main()
