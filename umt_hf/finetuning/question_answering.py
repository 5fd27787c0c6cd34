r"""Fine-tune a UMT video-text model to answer questions about videos, with the Hugging Face `Trainer`.

    umt-hf finetune question-answering --config question_answering_msvd:l16_25m \
        --data_root videos/msvd

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4; Li et al., "Align before Fuse", 2021, section 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import set_seed

from ..data.annotations import load_answers, load_questions
from ..evaluation.found import describe_questions, list_names
from ..evaluation.question_answering import compute_answer_accuracy
from ..hub_cards.released_names import convert_named
from ..inference.loading import load_complete_model
from ..inference.question_answering import answer_questions
from ..inference.starts import locate_model, require_start
from ..modeling.losses_umt import IGNORED_LABEL
from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import AnswerArguments, AnswerLengthArguments, CropArguments
from ..runs.config import describe, require, script
from ..runs.models import TRAINED_BY
from ..runs.noise import leave_out_load_report
from .best_metric import check_best_metric
from .trainer import (
    Evaluation,
    FinetunedModelArguments,
    FinetuningArguments,
    FinetuningTrainer,
    FoundSet,
    VideoTextClips,
    VideoTextDataArguments,
    add_adapters,
    build_processor,
    fine_tune,
    load_config,
    load_held_out,
    say_found_sets,
)

# The head's last matrix is the table of word embeddings: it stays frozen with it.
HEADS = ["lm_head.dense", "lm_head.norm"]


@dataclass(kw_only=True)
class QuestionDataArguments(VideoTextDataArguments, AnswerLengthArguments):
    """Videos with questions and answers."""

    max_question_tokens: int = describe(25, "Tokens of a question, [CLS] included.")


SECTIONS = {
    "model": FinetunedModelArguments,
    "data": QuestionDataArguments,
    "augmentation": CropArguments,
    "evaluation": AnswerArguments,
    "training": FinetuningArguments,
}


class QuestionCollator:
    """Clips, questions and answers to a batch of [`UMTVideoTextForQuestionAnswering`].

    Args:
        processor: Of the model.
        max_answer_tokens: Tokens of an answer, `[CLS]` and `[SEP]` included.
    """

    def __init__(self, processor: UMTVideoTextProcessor, max_answer_tokens: int):
        self.processor, self.max_answer_tokens = processor, max_answer_tokens

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`pixel_values`, `input_ids`, `attention_mask`, `labels` and weights of all answers, and `failures`."""
        rows = [sample["row"] for sample in samples]
        # All answers of a question are learned from, each with its weight.
        questions = self.processor(text=[row["question"] for row in rows], return_tensors="pt")
        answers = self.processor.encode_answers(
            [answer for row in rows for answer in row["answers"]], self.max_answer_tokens, return_tensors="pt"
        )
        return {
            **questions,
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": answers["input_ids"].masked_fill(answers["attention_mask"] == 0, IGNORED_LABEL),
            "answer_weights": torch.tensor([weight for row in rows for weight in row["answer_weights"]]),
            "answers_per_question": torch.tensor([len(row["answers"]) for row in rows]),
            "failures": [line for sample in samples for line in sample["failures"]],
        }


def load_question_model(
    args: FinetunedModelArguments, data: QuestionDataArguments
) -> UMTVideoTextForQuestionAnswering:
    """The model of a question-answering folder, or one whose decoder is copied from a stage-2 folder, in float32.

    Raises:
        ValueError: If it is another kind of folder, or lacks a part of the model.
    """
    folder = require(args.model_name_or_path, "model_name_or_path")
    model_class = UMTVideoTextForQuestionAnswering
    require_start(folder, model_class.__name__, TRAINED_BY[model_class.__name__][2])
    config = load_config(args, data)
    options: dict[str, Any] = {
        "config": config, "dtype": torch.float32, "attn_implementation": args.attn_implementation
    }  # fmt: skip
    if model_class.__name__ in (config.architectures or []):
        return load_complete_model(model_class, folder, **options)
    # It refuses whatever the folder lacks.
    with leave_out_load_report():
        return model_class.from_pretraining(locate_model(folder), **options)


def load_training_questions(data: QuestionDataArguments) -> Dataset:
    """Questions with at least one answer each.

    Raises:
        ValueError: If one has none.
    """
    source, options = data.select_source("train")
    table = load_questions(source, **options)
    rows: Any = table.remove_columns("video")
    for row in rows:
        if not row["answers"]:
            raise ValueError(f"{source}: question {row['question_id']!r} has no answer to train on.")
    return table


def build_answer_evaluation(
    questions: Dataset,
    processor: UMTVideoTextProcessor,
    data: QuestionDataArguments,
    args: AnswerArguments,
    training: FinetuningArguments,
    answers: list[str] | None,
) -> Evaluation:
    """Accuracy on held-out questions; `answers` is the closed list that they are ranked in, if any."""

    def answer(model: UMTVideoTextForQuestionAnswering, accelerator: Accelerator) -> dict[str, float]:
        predictions = answer_questions(
            model,
            processor,
            questions,
            accelerator,
            answers,
            batch_size=training.per_device_eval_batch_size,
            top_k=args.top_k,
            max_answer_tokens=data.max_answer_tokens,
            num_workers=training.dataloader_num_workers,
            show_progress=not training.disable_tqdm,
        )
        return compute_answer_accuracy(predictions, questions)

    return answer


@script(SECTIONS)
def main(
    args: FinetunedModelArguments,
    data: QuestionDataArguments,
    augmentation: CropArguments,
    evaluation: AnswerArguments,
    training: FinetuningArguments,
) -> dict[str, float]:
    """Build, train, evaluate, save.

    Returns:
        Metrics on the held-out questions.
    """
    check_best_metric(training, ["accuracy"])
    convert_named(args)
    set_seed(training.seed)  # before the model is built, which may have fresh weights
    table = load_training_questions(data)
    tables = load_held_out(training, data, lambda source, options: load_questions(source, **options))
    found = {prefix: FoundSet(describe_questions(own), list_names(own)) for prefix, own in tables.items()}
    say_found_sets(FoundSet(describe_questions(table), list_names(table)), found)
    answers = None if evaluation.answers is None else load_answers(evaluation.answers)
    model = load_question_model(args, data)
    processor = build_processor(args.model_name_or_path, model.config, data, data.max_question_tokens)
    evaluations = {
        prefix: build_answer_evaluation(own, processor, data, evaluation, training, answers)
        for prefix, own in tables.items()
    }
    trainer = FinetuningTrainer(
        model=add_adapters(model, args.mode, args.lora_rank, HEADS),
        args=training,
        train_dataset=VideoTextClips(table, data, augmentation, model.config.vision_config.image_size, training.seed),
        data_collator=QuestionCollator(processor, data.max_answer_tokens),
        processing_class=processor,
        evaluations=evaluations,
        max_skipped_ratio=data.max_skipped_ratio,
    )
    sections = (args, data, augmentation, evaluation, training)
    return fine_tune(trainer, dict(zip(SECTIONS, sections, strict=True)))


if __name__ == "__main__":
    main()
