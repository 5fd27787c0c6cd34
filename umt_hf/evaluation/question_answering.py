"""Measure answers to questions about videos, from a closed list or in the model's own words.

    accelerate launch -m umt_hf.evaluation.question_answering --model_name_or_path outputs/qa \
        --data msrvtt_qa_test.json --data_root videos --answers msrvtt_qa_answer_list.json

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..data.annotations import load_questions
from ..inference.held_out import group_by_video
from ..inference.question_answering import answer_questions, compute_answer_accuracy
from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..training.arguments import describe, parse_config
from .report import (
    EvaluatedModelArguments,
    EvaluationDataArguments,
    ReportArguments,
    describe_run,
    hash_source,
    load_model_and_processor,
    write_report,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class QuestionAnsweringArguments(ReportArguments):
    """How answers are found."""

    answers: str | None = describe(None, "JSON list of the possible answers; none = in the model's own words.")
    top_k: int | None = describe(
        None, "Answers of the list that are scored whole; none = 128, as published, or all of a shorter list."
    )
    max_answer_tokens: int = describe(5, "Tokens of an answer, [CLS] and [SEP] included.")


SECTIONS = {
    "model": EvaluatedModelArguments,
    "data": EvaluationDataArguments,
    "evaluation": QuestionAnsweringArguments,
}


def load_answers(path: str) -> list[str]:
    """Read a closed list of answers.

    Raises:
        ValueError: If the file holds no JSON list of texts.
    """
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}: expected a JSON list of answers.")
    return answers


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, answer, measure, report; without annotated answers only the predictions are written.

    Args:
        arguments: Command line; `None` = the process's own.

    Returns:
        `accuracy`, or nothing without annotated answers.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    model_args, data, args = parse_config(SECTIONS, sys.argv[1:] if arguments is None else arguments)
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    model, processor = load_model_and_processor(UMTVideoTextForQuestionAnswering, model_args, data)
    questions = load_questions(data.data, **data.source_options())
    predictions = answer_questions(
        model.to(accelerator.device),
        processor,
        questions,
        accelerator,
        None if args.answers is None else load_answers(args.answers),
        batch_size=args.per_device_eval_batch_size,
        top_k=args.top_k,
        max_answer_tokens=args.max_answer_tokens,
        num_workers=data.dataloader_num_workers,
    )
    metrics = compute_answer_accuracy(predictions, questions) if any(questions["answers"]) else {}
    report = {
        "task": "question answering",
        "metrics": metrics,
        "num_videos": len(group_by_video(questions["video"])[0]),
        "num_questions": len(questions),
        **describe_run(model, processor, accelerator, model_args, data),
        **dataclasses.asdict(args),
        "answers_sha256": None if args.answers is None else hash_source(args.answers),
    }
    write_report(accelerator, args.output_dir, report, predictions)
    return metrics


if __name__ == "__main__":
    main()
