"""Measure text-to-video and video-to-text retrieval, zero-shot or after fine-tuning.

    accelerate launch -m umt_hf.evaluation.retrieval --model_name_or_path umt-vit-b16-25m \
        --data msrvtt_ret_test1k.json --data_root videos --output_dir outputs/msrvtt

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from accelerate import Accelerator

from ..data.annotations import load_retrieval_set
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval, UMTVideoTextModel
from ..training.arguments import describe, parse_config
from .ranking import evaluate_retrieval
from .report import (
    EvaluatedModelArguments,
    EvaluationDataArguments,
    ReportArguments,
    describe_run,
    load_model_and_processor,
    write_report,
)


@dataclass(kw_only=True)
class RetrievalArguments(ReportArguments):
    """What is asked of the set."""

    captions: Literal["each", "paragraph"] = describe(
        "each", "A list of captions: texts of their own (MSVD), or the sentences of one text (ActivityNet, DiDeMo)."
    )
    multiple_videos_per_text: bool = describe(False, "Equal captions are one text with several videos (SSv2).")
    rerank: bool = describe(True, "Let the matching head judge the best items of the dual encoder.")
    top_k: int = describe(128, "Items of each query that the matching head judges.")
    dual_softmax: bool = describe(
        False, "Report dual softmax too, which needs all queries at once; comparable with nothing else."
    )
    cache_dir: str | None = describe(None, "Folder for the videos' tokens; none = the system's for temporary files.")


SECTIONS = {"model": EvaluatedModelArguments, "data": EvaluationDataArguments, "evaluation": RetrievalArguments}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, measure, report.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        Metrics; see `evaluate_retrieval`.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    model_args, data, args = parse_config(SECTIONS, sys.argv[1:] if arguments is None else arguments)
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    model_class = UMTVideoTextForRetrieval if args.rerank else UMTVideoTextModel
    model, processor = load_model_and_processor(model_class, model_args, data)
    retrieval_set = load_retrieval_set(
        data.data, args.captions, args.multiple_videos_per_text, **data.source_options()
    )
    metrics = evaluate_retrieval(
        model.to(accelerator.device),
        processor,
        retrieval_set,
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        top_k=args.top_k,
        rerank=args.rerank,
        dual_softmax=args.dual_softmax,
        num_workers=data.dataloader_num_workers,
        cache_dir=args.cache_dir,
    )
    report = {
        "task": "retrieval",
        "metrics": metrics,
        "num_videos": len(retrieval_set.videos),
        "num_texts": len(retrieval_set.texts),
        **describe_run(model, processor, accelerator, model_args, data),
        **dataclasses.asdict(args),
    }
    write_report(accelerator, args.output_dir, report)
    return metrics


if __name__ == "__main__":
    main()
