"""Which of several captions a video shows: similarity and matching head together."""

import torch
from accelerate import Accelerator
from datasets import Dataset

from ..inference.held_out import evaluation_mode, load_video_batches, plan_shard, share_rows
from ..modeling.losses_umt import compute_similarity
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from .metrics.answers import ChoiceAccuracy

MATCHING_SHARE = 0.7


def score_choices(
    model: UMTVideoTextForRetrieval,
    processor: UMTVideoTextProcessor,
    choices: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 16,
    num_workers: int = 4,
) -> list[list[float]]:
    """Score the options of every row; called in all processes, each gets all scores.

    Args:
        model: It runs as in `eval()`.
        processor: Its number of frames, size, decoder and text length hold; frames are the middle ones of equal parts.
        choices: As `load_choices` gives them.
        accelerator: Of the run; its precision holds.
        batch_size: Rows a process takes at a time.
        num_workers: Processes that decode, for each process.

    Returns:
        For each row, one score an option: 0.7 times the matching head's probability of a match, plus 0.3 times the
        softmax over the row's options of similarity over temperature.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.

    Source: the published multiple-choice test.
    """
    counts = [len(options) for options in choices["caption"]]
    scores = torch.zeros(len(counts), max(counts))
    batches = plan_shard(len(counts), batch_size, accelerator)
    videos = list(choices["video"])
    with evaluation_mode(model, accelerator):
        for batch, pixels in load_video_batches(videos, batches, processor.video_processor, accelerator, num_workers):
            captions = [caption for row in batch for caption in choices[row]["caption"]]
            encoded = processor(text=captions, padding=True, return_tensors="pt").to(accelerator.device)
            batch_scores = compute_choice_scores(
                model, pixels, encoded["input_ids"], encoded["attention_mask"], [counts[row] for row in batch]
            )
            for row, row_scores in zip(batch, batch_scores, strict=True):
                scores[row, : counts[row]] = row_scores.cpu()
    share_rows(scores, accelerator)
    return [row[:count].tolist() for row, count in zip(scores, counts, strict=True)]


def compute_choice_scores(
    model: UMTVideoTextForRetrieval,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    counts: list[int],
) -> list[torch.Tensor]:
    """Blend similarity and matching for the options of each video.

    Args:
        model: With a matching head.
        pixel_values: Normalised videos `(B, T, channels, height, width)`.
        input_ids: Options, those of the first video first, `(sum(counts), L)`.
        attention_mask: 1 at their tokens and 0 at padding.
        counts: Options of each video.

    Returns:
        Float32 scores `(options,)` for each video.
    """
    video, text = model.get_video_features(pixel_values), model.get_text_features(input_ids, attention_mask)
    video_of_option = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(input_ids.device)
    similarities = compute_similarity(video.pooler_output, text.pooler_output) / model.temperature.float()
    similarities = similarities[video_of_option, torch.arange(len(input_ids), device=input_ids.device)]
    logits = model.match(video.last_hidden_state[video_of_option], text.last_hidden_state, attention_mask)
    matching = logits.float().softmax(dim=1)[:, 1]
    blended = zip(matching.split(counts), similarities.split(counts), strict=True)
    return [MATCHING_SHARE * match + (1 - MATCHING_SHARE) * similar.softmax(dim=0) for match, similar in blended]


def compute_choice_accuracy(scores: list[list[float]], choices: Dataset) -> dict[str, float]:
    """Share of rows whose right option has the highest score, in [0, 1], as `accuracy`."""
    answers = [int(answer) for answer in choices["answer"]]
    return ChoiceAccuracy(keep_in_memory=True).compute(predictions=scores, references=answers)
