"""Answers to questions about videos: the best of a closed list, or words of the model's own."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import BatchEncoding

from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments
from .held_out import evaluation_mode, group_by_video, load_video_batches, plan_shard
from .loading import load_whole_model

PUBLISHED_TOP_K = 128


def answer_questions(
    model: UMTVideoTextForQuestionAnswering,
    processor: UMTVideoTextProcessor,
    questions: Dataset,
    accelerator: Accelerator,
    answers: list[str] | None = None,
    *,
    batch_size: int = 16,
    top_k: int | None = None,
    max_answer_tokens: int = 5,
    num_workers: int = 4,
    num_ranked: int | None = None,
) -> list[dict[str, Any]]:
    """Answer questions; called in all processes, each gets all predictions.

    A video with several questions is read once.

    Args:
        model: It runs as in `eval()`.
        processor: Its number of frames, size, decoder and text length hold; frames are the middle ones of equal parts.
        questions: As `load_questions` gives them.
        accelerator: Of the run; its precision holds.
        answers: The closed list; `None` = the decoder answers in its own words, greedily.
        batch_size: Videos or questions a process takes at a time.
        top_k: Answers of the list that are scored by all their tokens, those with the likeliest first token; `None` =
            128 as published, or all of a shorter list.
        max_answer_tokens: Tokens of an answer, `[CLS]` and `[SEP]` included.
        num_workers: Processes that decode, for each process.
        num_ranked: Answers of the list that are told of each question; `None` = the best alone.

    Returns:
        One dictionary a question, in order, with `question_id`, `answer` and, from a list, `probability` among the
        `top_k`; with `num_ranked` also `ranked`, a list of such answers, best first.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If `top_k` exceeds the list.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4; Li et al., "Align before Fuse", 2021, section 5.
    """
    encoded = None
    if answers is not None:
        top_k = min(PUBLISHED_TOP_K, len(answers)) if top_k is None else top_k
        if top_k > len(answers):
            raise ValueError(f"top_k={top_k} exceeds the list of {len(answers)} answers: set top_k={len(answers)}.")
        encoded = processor.encode_answers(answers, max_answer_tokens, return_tensors="pt").to(accelerator.device)
    videos, rows_of_video = group_by_video(questions["video"])
    batches = plan_shard(len(videos), batch_size, accelerator)
    found: list[tuple[int, dict[str, Any]]] = []
    with evaluation_mode(model, accelerator):
        for batch, pixels in load_video_batches(videos, batches, processor.video_processor, accelerator, num_workers):
            pairs = [(place, row) for place, video in enumerate(batch) for row in rows_of_video[video]]
            for start in range(0, len(pairs), batch_size):
                places, rows = zip(*pairs[start : start + batch_size], strict=True)
                inputs = _encode_questions(processor, [questions[row]["question"] for row in rows], accelerator)
                inputs["pixel_values"] = pixels[list(places)]
                if encoded is None:
                    replies = _generate(model, processor, inputs, max_answer_tokens)
                else:
                    replies = _rank(model, inputs, answers, encoded, top_k, num_ranked)
                found += zip(rows, replies, strict=True)
    found = sorted(gather_object(found), key=lambda pair: pair[0])
    return [{"question_id": questions[row]["question_id"], **reply} for row, reply in found]


def ask_video(
    video: str | os.PathLike,
    question: str,
    model: str | os.PathLike,
    answers: list[str] | None = None,
    num_ranked: int = 5,
) -> dict[str, Any]:
    """Answer one question about one video.

    Args:
        video: Path or URL.
        question: In words.
        model: Folder or Hub id of a question-answering model with its processor.
        answers: The closed list to rank; `None` = the decoder answers in its own words.
        num_ranked: Answers of the list that are told.

    Returns:
        `answer` and, from a list, its `probability` and `ranked`, the best answers; see `answer_questions`.

    Raises:
        VideoDecodingError: If the video cannot be read; it names the file.
        ValueError: If the model is no whole question-answering model, or the question is empty.
        OSError: If there is no model, or no processor beside it.
    """
    if not question.strip():
        raise ValueError("The question is empty.")
    accelerator = Accelerator()
    args = EvaluatedModelArguments(model_name_or_path=str(model))
    loaded = load_whole_model(UMTVideoTextForQuestionAnswering, args).to(accelerator.device)
    top_k = None if answers is None else min(max(num_ranked, PUBLISHED_TOP_K), len(answers))
    replies = answer_questions(
        loaded,
        UMTVideoTextProcessor.from_pretrained(model),
        Dataset.from_list([{"question_id": 0, "video": os.fspath(video), "question": question}]),
        accelerator,
        answers,
        top_k=top_k,
        num_workers=0,
        num_ranked=num_ranked,
    )
    del replies[0]["question_id"]
    return replies[0]


def format_reply(reply: dict[str, Any]) -> str:
    """Write what `ask_video` gives as lines for people: the answer, or the ranked ones with their probabilities."""
    if "ranked" not in reply:
        return reply["answer"]
    return "\n".join(f"{entry['probability']:6.4f}  {entry['answer']}" for entry in reply["ranked"])


def _encode_questions(
    processor: UMTVideoTextProcessor, questions: list[str], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    encoded = processor(text=questions, padding=True, return_tensors="pt").to(accelerator.device)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _rank(
    model: UMTVideoTextForQuestionAnswering,
    inputs: dict[str, torch.Tensor],
    answers: list[str],
    encoded: BatchEncoding,
    top_k: int,
    num_ranked: int | None,
) -> list[dict[str, Any]]:
    indices, probabilities = model.rank_answers(
        **inputs,
        answer_input_ids=encoded["input_ids"],
        answer_attention_mask=encoded["attention_mask"],
        top_k=top_k,
    )
    replies = []
    for best, shares in zip(indices[:, : num_ranked or 1].tolist(), probabilities.tolist(), strict=True):
        ranked = [{"answer": answers[index], "probability": share} for index, share in zip(best, shares, strict=False)]
        replies.append(ranked[0] if num_ranked is None else {**ranked[0], "ranked": ranked})
    return replies


def _generate(
    model: UMTVideoTextForQuestionAnswering,
    processor: UMTVideoTextProcessor,
    inputs: dict[str, torch.Tensor],
    max_answer_tokens: int,
) -> list[dict[str, Any]]:
    tokens = model.generate(**inputs, max_new_tokens=max_answer_tokens - 1, do_sample=False)
    return [{"answer": text} for text in processor.batch_decode(tokens, skip_special_tokens=True)]
