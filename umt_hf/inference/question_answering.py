"""Answers to questions about videos: the best of a closed list, or the model's own words."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.video_utils import VideoInput

from ..modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering
from ..processing.decoding import VideoSource
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import KeptTokenArguments
from .arguments import require_count, require_string
from .held_out import (
    evaluation_mode,
    group_by_video,
    load_video_batches,
    plan_shard,
    read_middle_frames,
    require_finite,
)
from .loading import keep_tokens, load_complete_model, load_video_text_processor, place_model, resolve_device

PUBLISHED_TOP_K = 128


@dataclass(frozen=True)
class AnswerList:
    """A closed list of answers as tokens.

    Attributes:
        answers: The answers.
        input_ids: `(answers, L)`.
        attention_mask: 1 at tokens and 0 at padding.
        top_k: How many are scored by all their tokens, those with the likeliest first token.
    """

    answers: Sequence[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    top_k: int


def encode_answer_list(
    processor: UMTVideoTextProcessor,
    answers: Sequence[str],
    device: torch.device,
    max_answer_tokens: int = 5,
    top_k: int = PUBLISHED_TOP_K,
) -> AnswerList:
    """Turn answers into tokens on a device; `top_k` is at most their number."""
    encoded = processor.encode_answers(list(answers), max_answer_tokens, return_tensors="pt").to(device)
    return AnswerList(answers, encoded["input_ids"], encoded["attention_mask"], min(top_k, len(answers)))


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
    num_workers: int | None = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer questions; called in all processes, each gets all predictions.

    Args:
        model: It runs as in `eval()`.
        processor: Gives number of frames, size, decoder and text length.
        questions: As `load_questions` gives them.
        accelerator: Of the run; gives the precision.
        answers: The closed list; default: the decoder answers in its own words, greedily.
        batch_size: Videos or questions that a process takes at a time.
        top_k: How many answers are scored by all their tokens; default: 128 as published, or all of a shorter list.
        max_answer_tokens: Tokens of an answer, `[CLS]` and `[SEP]` included.
        num_workers: Processes that decode, for each process; default: its share of the cores, from 1 to 4.
        show_progress: Whether the main process draws a bar of its share.

    Returns:
        One dictionary per question, in order, with `question_id`, `answer` and, from a list, `probability` among the
        `top_k`.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If `top_k` exceeds the list, or scores are NaN or infinite; it names the model and the question.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4; Li et al., "Align before Fuse", 2021, section 5.
    """
    closed = None
    if answers is not None:
        if top_k is not None and top_k > len(answers):
            raise ValueError(f"top_k={top_k} exceeds the list of {len(answers)} answers: set top_k={len(answers)}.")
        top_k = PUBLISHED_TOP_K if top_k is None else top_k
        # As many answers as are returned have to be scored by all their tokens.
        closed = encode_answer_list(processor, answers, accelerator.device, max_answer_tokens, top_k)
    videos, rows_of_video = group_by_video(questions["video"])  # one with several questions is read once
    batches = plan_shard(len(videos), batch_size, accelerator)
    found: list[tuple[int, dict[str, Any]]] = []
    with evaluation_mode(model, accelerator):
        for batch, pixels in load_video_batches(
            videos, batches, processor.video_processor, accelerator, num_workers, show_progress
        ):
            # A video is encoded once for all its questions, and its keys and values are projected once.
            key_values = model.get_video_key_values(model.vision_model(pixels, return_dict=True).last_hidden_state)
            # A batch of videos may bring many more questions, which then go through in parts.
            pairs = [(place, row) for place, video in enumerate(batch) for row in rows_of_video[video]]
            for start in range(0, len(pairs), batch_size):
                places, rows = zip(*pairs[start : start + batch_size], strict=True)
                texts = [questions[row]["question"] for row in rows]
                inputs: dict[str, Any] = {"pixel_values": None} | _encode_questions(
                    processor, texts, accelerator.device
                )
                inputs["video_key_values"] = key_values
                inputs["encoder_rows"] = torch.tensor(places, device=accelerator.device)
                if closed is None:
                    given = _generate(model, processor, inputs, texts, max_answer_tokens)
                    replies = [{"answer": text} for text in given]
                else:
                    replies = [asdict(ranked[0]) for ranked in _rank(model, inputs, texts, closed)]
                found += zip(rows, replies, strict=True)
    found = sorted(gather_object(found), key=lambda pair: pair[0])  # processes answer other videos each
    return [{"question_id": questions[row]["question_id"], **reply} for row, reply in found]


@dataclass(frozen=True)
class RankedAnswer:
    """An answer of a closed list, and its probability among those that were scored."""

    answer: str
    probability: float


@dataclass(frozen=True)
class VideoAnswer:
    """What `VideoAnswerer.answer` says.

    Attributes:
        answer: The answer; the best one of a closed list.
        ranked: The best answers of a closed list with their probabilities, best first; empty without a list.
    """

    answer: str
    ranked: tuple[RankedAnswer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `answer`, and of a closed list also its `probability` and `ranked`."""
        if not self.ranked:
            return {"answer": self.answer}
        return {**asdict(self.ranked[0]), "ranked": [asdict(entry) for entry in self.ranked]}

    def format(self) -> str:
        """Write it as lines for people: the answer, or the ranked ones with their probabilities."""
        if not self.ranked:
            return self.answer
        return "\n".join(f"{entry.probability:6.4f}  {entry.answer}" for entry in self.ranked)


class VideoAnswerer:
    """Answers questions about videos: loads a question-answering model once and answers often.

    Args:
        model: Folder or Hub id of a question-answering model with its processor.
        device: Where the model runs; default: the process's accelerator, or CPU.
        attn_implementation: "sdpa", "eager", ...; default: Transformers' choice.
        dtype: Default: that of the stored weights.
        tokens: Which tokens of a video the encoder sees; default: as the model's configuration says.

    Raises:
        ValueError: If the model lacks weights, such as those of the answer decoder.
        OSError: If there is no model, or no processor beside it.

    Examples:
        >>> from umt_hf import VideoAnswerer
        >>> answerer = VideoAnswerer("umt-vit-b16-25m-msrvtt-qa")
        >>> question, colors = "what color is the ring?", ["red", "blue", "green"]
        >>> answerer.answer("video.mp4", question, colors).ranked[0].answer
        'blue'
        >>> words = answerer.answer("video.mp4", question).answer  # its own words
    """

    def __init__(
        self,
        model: str | os.PathLike,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        tokens: KeptTokenArguments | None = None,
    ):
        options: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": dtype}
        loaded = load_complete_model(UMTVideoTextForQuestionAnswering, model, **options)
        self.kept_tokens = keep_tokens(loaded, tokens)
        self.processor = load_video_text_processor(model)
        self.device = resolve_device(device)
        self.model = place_model(loaded, self.device)

    @torch.inference_mode()
    def answer(
        self,
        video: VideoInput | VideoSource,
        question: str,
        answers: Sequence[str] | None = None,
        num_ranked: int = 5,
        max_answer_tokens: int = 5,
    ) -> VideoAnswer:
        """Answer a question about a video.

        Args:
            video: What the processor takes: path, URL, bytes, array, tensor or frames.
            question: In words.
            answers: Closed list of answers to rank; default: the decoder answers in its own words.
            num_ranked: How many answers of the list to return.
            max_answer_tokens: Tokens of an answer, `[CLS]` and `[SEP]` included.

        Raises:
            VideoDecodingError: If the video cannot be read.
            ValueError: If the question or the list is empty, `num_ranked` is below 1, or the model gives NaN or
                infinite values.
        """
        require_string("question", question, "ask what the video shows.")
        require_count("num_ranked", num_ranked)
        require_count("max_answer_tokens", max_answer_tokens, 2)
        if isinstance(answers, str | os.PathLike):
            raise ValueError(f"answers is a list of texts, got the single text {os.fspath(answers)!r}.")
        if answers is not None and not len(answers):
            raise ValueError("The list of answers is empty.")
        pixel_values = read_middle_frames(self.processor.video_processor, video)[None]
        inputs: dict[str, Any] = {
            "pixel_values": pixel_values.to(self.device, self.model.dtype),
            **_encode_questions(self.processor, [question], self.device),
        }
        if answers is None:
            return VideoAnswer(_generate(self.model, self.processor, inputs, [question], max_answer_tokens)[0])
        closed = encode_answer_list(
            self.processor, answers, self.device, max_answer_tokens, max(num_ranked, PUBLISHED_TOP_K)
        )
        ranked = _rank(self.model, inputs, [question], closed)[0][:num_ranked]
        return VideoAnswer(ranked[0].answer, tuple(ranked))


def _encode_questions(
    processor: UMTVideoTextProcessor, questions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    encoded = processor(text=questions, padding=True, return_tensors="pt").to(device)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _rank(
    model: UMTVideoTextForQuestionAnswering,
    inputs: dict[str, Any],
    questions: Sequence[str],
    closed: AnswerList,
) -> list[list[RankedAnswer]]:
    """The `top_k` answers of a list for each question, best first."""
    indices, probabilities = model.rank_answers(
        **inputs,
        answer_input_ids=closed.input_ids,
        answer_attention_mask=closed.attention_mask,
        top_k=closed.top_k,
    )
    require_finite(model, probabilities, "questions", lambda row: repr(questions[row]))
    return [
        [RankedAnswer(closed.answers[index], share) for index, share in zip(best, shares, strict=True)]
        for best, shares in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]


def _generate(
    model: UMTVideoTextForQuestionAnswering,
    processor: UMTVideoTextProcessor,
    inputs: dict[str, Any],
    questions: Sequence[str],
    max_answer_tokens: int,
) -> list[str]:
    # [CLS], from which the decoder starts, is one of the tokens of an answer.
    found = model.generate(
        **inputs,
        max_new_tokens=max_answer_tokens - 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # Of NaN the best token is the first one of the vocabulary, and the answer an empty text.
    for logits in found.logits:
        require_finite(model, logits, "questions", lambda row: repr(questions[row]))
    return processor.batch_decode(found.sequences, skip_special_tokens=True)
