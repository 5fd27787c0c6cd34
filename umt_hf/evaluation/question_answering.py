"""Measure answers to questions about videos, from a closed list or in the model's own words.

    accelerate launch -m umt_hf.evaluation.question_answering --model_name_or_path outputs/qa \
        --data msrvtt_qa_test.json --data_root videos --answers msrvtt_qa_answer_list.json

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from datasets import Dataset

from ..data.annotations import load_answers, load_questions
from ..inference.held_out import group_by_video
from ..inference.question_answering import answer_questions
from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments, ReportArguments
from ..runs.config import describe, parse_config
from ..runs.folder import hash_source
from .metrics.accuracy import ExactAnswerAccuracy
from .report import describe_run, write_report
from .setup import load_model_and_processor

logger = logging.getLogger(__name__)


def compute_answer_accuracy(predictions: list[dict[str, Any]], questions: Dataset) -> dict[str, float]:
    """Share of questions answered exactly as annotated (by any of the annotators); unanswered ones are wrong.

    Args:
        predictions: With `question_id` and `answer`, in any order.
        questions: As `load_questions` gives them.

    Returns:
        `accuracy`, in [0, 1].

    Raises:
        ValueError: If a question has no annotated answer, or an id belongs to two questions or to none.
    """
    ids = list(questions["question_id"])
    given = {prediction["question_id"]: prediction["answer"] for prediction in predictions}
    if len(set(ids)) < len(ids) or len(given) < len(predictions):
        raise ValueError("A question_id appears twice: give every question its own.")
    if unknown := given.keys() - set(ids):
        raise ValueError(f"Answers to questions that are not in the set: {sorted(unknown, key=str)[:5]}.")
    references = list(questions["answers"])
    for question_id, annotated in zip(ids, references, strict=True):
        if not annotated:
            raise ValueError(f"Question {question_id} has no annotated answer to compare with.")
    metric = ExactAnswerAccuracy(keep_in_memory=True)
    figures = metric.compute(predictions=[given.get(question_id) for question_id in ids], references=references)
    return cast("dict[str, float]", figures)  # None is for processes that compute nothing


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


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, load, answer, measure, report; without annotated answers only the predictions are written.

    Args:
        arguments: Command line; default: the process's own.

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
