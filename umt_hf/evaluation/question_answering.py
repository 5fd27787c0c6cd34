r"""Measure answers to questions about videos, from a closed list or in the model's own words.

    umt-hf evaluate question-answering --model_name_or_path outputs/qa \
        --data msrvtt_qa_test.json --data_root videos \
        --answers msrvtt_qa_answer_list.json

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from datasets import Dataset

from ..data.annotations import load_answers, load_questions
from ..inference.held_out import group_by_video
from ..inference.question_answering import answer_questions
from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..runs.arguments import (
    AnswerArguments,
    AnswerLengthArguments,
    EvaluatedModelArguments,
    EvaluationDataArguments,
    ReportArguments,
)
from ..runs.config import script
from ..runs.folder import hash_source
from .found import describe_questions
from .metrics.accuracy import ExactAnswerAccuracy
from .report import describe_run, write_report
from .setup import load_model_and_processor, measured_run, require_names, say_tested

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
    # Two questions of one id would share an answer, and one of them would count wrongly.
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
class AnswerReportArguments(ReportArguments, AnswerArguments, AnswerLengthArguments):
    """How answers are found, and the report."""


SECTIONS = {
    "model": EvaluatedModelArguments,
    "data": EvaluationDataArguments,
    "evaluation": AnswerReportArguments,
}


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data: EvaluationDataArguments, args: AnswerReportArguments
) -> dict[str, float]:
    """Load, answer, measure, report; without annotated answers only the predictions are written.

    Returns:
        `accuracy`, or nothing without annotated answers.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    _, source = require_names(model_args, data)
    questions = load_questions(source, **data.source_options())
    answers = None if args.answers is None else load_answers(args.answers)
    model, processor = load_model_and_processor(UMTVideoTextForQuestionAnswering, model_args, data)
    say_tested(model_args, data, describe_questions(questions))
    with measured_run(accelerator, data):
        predictions = answer_questions(
            model.to(accelerator.device),
            processor,
            questions,
            accelerator,
            answers,
            batch_size=args.per_device_eval_batch_size,
            top_k=args.top_k,
            max_answer_tokens=args.max_answer_tokens,
            num_workers=data.dataloader_num_workers,
            show_progress=not args.disable_tqdm,
        )
    # Sets whose answers are held back are answered for a test server.
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
    write_report(accelerator, args.report_folder, report, predictions)
    return metrics


if __name__ == "__main__":
    main()
