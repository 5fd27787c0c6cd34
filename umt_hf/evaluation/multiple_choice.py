r"""Measure how often the right one of several captions is chosen for a video.

    umt-hf evaluate multiple-choice --model_name_or_path umt-vit-l16-25m-msrvtt \
        --data msrvtt_mc_test.json --data_root videos \
        --output_dir outputs/msrvtt_mc

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

import dataclasses
from typing import cast

import torch
from accelerate import Accelerator
from datasets import Dataset

from ..data.annotations import load_choices, name_video
from ..inference.held_out import (
    evaluation_mode,
    group_by_video,
    load_video_batches,
    mark_nonfinite,
    plan_shard,
    require_finite,
    share_rows,
)
from ..modeling.losses_umt import compute_similarity
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import EvaluatedModelArguments, EvaluationDataArguments, ReportArguments
from ..runs.config import script
from .found import describe_choices
from .metrics.accuracy import ChoiceAccuracy
from .report import describe_run, write_report
from .setup import load_model_and_processor, measured_run, require_names, say_tested

MATCHING_SHARE = 0.7


def score_choices(
    model: UMTVideoTextForRetrieval,
    processor: UMTVideoTextProcessor,
    choices: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 16,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> list[list[float]]:
    """Score the options of every row; called in all processes, each gets all scores.

    Args:
        model: It runs as in `eval()`.
        processor: Its number of frames, size, decoder and text length hold; frames are the middle ones of equal parts.
        choices: As `load_choices` gives them.
        accelerator: Of the run; its precision holds.
        batch_size: Rows that a process takes at a time.
        num_workers: Processes that decode, for each process; default: its share of the cores, from 1 to 4.
        show_progress: Whether the main process draws a bar of its share.

    Returns:
        For each row, one score an option: 0.7 times the matching head's probability of a match, plus 0.3 times the
        softmax over the row's options of similarity over temperature.

    Raises:
        VideoDecodingError: If a video cannot be read; it names the file.
        ValueError: If a score is NaN or infinite; it names the model and the video.

    Source: the published multiple-choice test.
    """
    counts = [len(options) for options in choices["caption"]]
    # Padded to the longest list of options; what stands beyond a row's own is cut off below.
    scores = torch.zeros(len(counts), max(counts))
    batches = plan_shard(len(counts), batch_size, accelerator)
    # Rows may repeat a video; it is read once per row, as its options differ.
    videos = list(choices["video"])
    with evaluation_mode(model, accelerator):
        for batch, pixels in load_video_batches(
            videos, batches, processor.video_processor, accelerator, num_workers, show_progress
        ):
            captions = [caption for row in batch for caption in choices[row]["caption"]]
            encoded = processor(text=captions, padding=True, return_tensors="pt").to(accelerator.device)
            batch_scores = compute_choice_scores(
                model, pixels, encoded["input_ids"], encoded["attention_mask"], [counts[row] for row in batch]
            )
            for row, row_scores in zip(batch, batch_scores, strict=True):
                scores[row, : counts[row]] = row_scores.cpu()
    share_rows(scores, accelerator)
    require_finite(model, scores, "rows", lambda row: name_video(videos[row], row))
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
    logits = model.match(video.last_hidden_state, text.last_hidden_state, attention_mask, encoder_rows=video_of_option)
    matching = mark_nonfinite(logits).softmax(dim=1)[:, 1]
    # The softmax runs over a video's own options, the matching head sees each alone.
    blended = zip(matching.split(counts), similarities.split(counts), strict=True)
    return [MATCHING_SHARE * match + (1 - MATCHING_SHARE) * similar.softmax(dim=0) for match, similar in blended]


def compute_choice_accuracy(scores: list[list[float]], choices: Dataset) -> dict[str, float]:
    """Share of rows whose right option has the highest score, in [0, 1], as `accuracy`."""
    answers = [int(answer) for answer in choices["answer"]]
    figures = ChoiceAccuracy(keep_in_memory=True).compute(predictions=scores, references=answers)
    return cast("dict[str, float]", figures)  # None is for processes that compute nothing


SECTIONS = {"model": EvaluatedModelArguments, "data": EvaluationDataArguments, "evaluation": ReportArguments}


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data: EvaluationDataArguments, args: ReportArguments
) -> dict[str, float]:
    """Load, choose, measure, report.

    Returns:
        `accuracy`.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    _, source = require_names(model_args, data)
    choices = load_choices(source, **data.source_options())
    model, processor = load_model_and_processor(UMTVideoTextForRetrieval, model_args, data)
    say_tested(model_args, data, describe_choices(choices))
    with measured_run(accelerator, data):
        scores = score_choices(
            model.to(accelerator.device),
            processor,
            choices,
            accelerator,
            batch_size=args.per_device_eval_batch_size,
            num_workers=data.dataloader_num_workers,
            show_progress=not args.disable_tqdm,
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
    write_report(accelerator, args.report_folder, report, predictions)
    return metrics


if __name__ == "__main__":
    main()
