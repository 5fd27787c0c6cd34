r"""Fine-tune a UMT video-text model to retrieve videos by text and texts by video, with the Hugging Face `Trainer`.

    umt-hf finetune retrieval --config retrieval_msrvtt:b16_25m \
        --data_root videos/msrvtt

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import set_seed

from ..data.annotations import (
    RetrievalSet,
    compute_pair_id,
    identify_video,
    load_choices,
    load_pairs,
    load_retrieval_set,
)
from ..evaluation.found import count_texts, describe_choices, list_names, name_media
from ..evaluation.multiple_choice import compute_choice_accuracy, score_choices
from ..evaluation.retrieval import evaluate_retrieval, list_figure_names
from ..hub_cards.released_names import convert_named
from ..inference.loading import load_complete_model
from ..inference.starts import require_start
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.arguments import CaptionArguments, CropArguments, RerankingArguments, TextLengthArguments
from ..runs.config import describe, require, script, set_defaults
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

HEADS = ["video_norm", "video_projection", "text_projection", "matching_head"]


@dataclass(kw_only=True)
@set_defaults(max_text_tokens=32)
class RetrievalDataArguments(VideoTextDataArguments, CaptionArguments, TextLengthArguments):
    """Videos with captions, and which of them belong together."""


@dataclass(kw_only=True)
class RetrievalEvaluationArguments(RerankingArguments):
    """How held-out data is scored."""

    task: Literal["retrieval", "multiple_choice"] = describe("retrieval", "Search, or choose among captions.")


SECTIONS = {
    "model": FinetunedModelArguments,
    "data": RetrievalDataArguments,
    "augmentation": CropArguments,
    "evaluation": RetrievalEvaluationArguments,
    "training": FinetuningArguments,
}


class CaptionCollator:
    """Clips and their captions to a batch of [`UMTVideoTextForRetrieval`].

    Args:
        processor: Of the model.
        pair_by_caption: Whether equal captions are true pairs, as in SSv2; otherwise captions of one video are.
    """

    def __init__(self, processor: UMTVideoTextProcessor, pair_by_caption: bool):
        self.processor, self.pair_by_caption = processor, pair_by_caption

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`pixel_values`, `input_ids`, `attention_mask`, `pair_ids`, `return_loss` and `failures`."""
        texts = self.processor(text=[sample["row"]["caption"] for sample in samples], return_tensors="pt")
        return {
            **texts,
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "pair_ids": torch.tensor([self.identify(sample) for sample in samples]),
            "return_loss": True,
            "failures": [line for sample in samples for line in sample["failures"]],
        }

    def identify(self, sample: dict[str, Any]) -> int:
        """Id of what the caption of a clip belongs to."""
        row = sample["row"]
        # 0: there is a single corpus. The number of the row tells videos without a name apart.
        return compute_pair_id(
            0, row["caption"] if self.pair_by_caption else identify_video(row["video"], sample["number"])
        )


def load_retrieval_model(args: FinetunedModelArguments, data: RetrievalDataArguments) -> UMTVideoTextForRetrieval:
    """The model of a stage-2 or fine-tuned folder, in float32.

    Raises:
        ValueError: If it is another kind of folder, or lacks a part of the model.
    """
    folder = require(args.model_name_or_path, "model_name_or_path")
    require_start(folder, UMTVideoTextForRetrieval.__name__)  # before its configuration is read as one of these
    return load_complete_model(
        UMTVideoTextForRetrieval,
        folder,
        config=load_config(args, data),
        dtype=torch.float32,
        attn_implementation=args.attn_implementation,
        hint="Give a stage-2 or retrieval folder.",
    )


def load_tested(
    source: str, options: dict[str, Any], data: RetrievalDataArguments, task: str
) -> RetrievalSet | Dataset:
    """A held-out set to search in, or of choices among captions."""
    if task == "multiple_choice":
        return load_choices(source, **options)
    captions = "paragraph" if data.captions == "paragraph" else "each"
    return load_retrieval_set(source, captions, data.multiple_videos_per_text, **options)


def describe_tested(tested: RetrievalSet | Dataset) -> FoundSet:
    """What a held-out set holds."""
    if isinstance(tested, Dataset):
        return FoundSet(describe_choices(tested), list_names(tested))
    return FoundSet(count_texts(len(tested.videos), len(tested.texts)), name_media(tested.videos))


def build_retrieval_evaluation(
    tested: RetrievalSet | Dataset,
    processor: UMTVideoTextProcessor,
    args: RetrievalEvaluationArguments,
    training: FinetuningArguments,
) -> Evaluation:
    """Search in, or choice among the captions of, a held-out set."""
    common = {"batch_size": training.per_device_eval_batch_size, "num_workers": training.dataloader_num_workers}
    common["show_progress"] = not training.disable_tqdm
    if isinstance(tested, Dataset):
        choices = tested

        def choose(model: UMTVideoTextForRetrieval, accelerator: Accelerator) -> dict[str, float]:
            return compute_choice_accuracy(score_choices(model, processor, choices, accelerator, **common), choices)

        return choose
    held_out = tested

    def search(model: UMTVideoTextForRetrieval, accelerator: Accelerator) -> dict[str, float]:
        return evaluate_retrieval(
            model,
            processor,
            held_out,
            accelerator,
            top_k=args.rerank_top_k or 1,
            rerank=args.rerank_top_k > 0,
            **common,
        )

    return search


def _list_figures(args: RetrievalEvaluationArguments) -> list[str]:
    """Names of the figures on held-out data."""
    return ["accuracy"] if args.task == "multiple_choice" else list_figure_names(args.rerank_top_k > 0)


@script(SECTIONS)
def main(
    args: FinetunedModelArguments,
    data: RetrievalDataArguments,
    augmentation: CropArguments,
    evaluation: RetrievalEvaluationArguments,
    training: FinetuningArguments,
) -> dict[str, float]:
    """Build, train, evaluate, save.

    Returns:
        Metrics on the held-out videos.
    """
    check_best_metric(training, _list_figures(evaluation))
    convert_named(args)
    set_seed(training.seed)  # before the model is built, which may have fresh weights
    source, options = data.select_source("train")
    table = load_pairs(source, data.captions, **options)
    tested = load_held_out(training, data, partial(load_tested, data=data, task=evaluation.task))
    names = list_names(table)
    found = {prefix: describe_tested(own) for prefix, own in tested.items()}
    say_found_sets(FoundSet(count_texts(len(set(names)), len(table)), names), found)
    model = load_retrieval_model(args, data)
    processor = build_processor(args.model_name_or_path, model.config, data, data.max_text_tokens)
    evaluations = {
        prefix: build_retrieval_evaluation(own, processor, evaluation, training) for prefix, own in tested.items()
    }
    trainer = FinetuningTrainer(
        model=add_adapters(model, args.mode, args.lora_rank, HEADS),
        args=training,
        train_dataset=VideoTextClips(table, data, augmentation, model.config.vision_config.image_size, training.seed),
        data_collator=CaptionCollator(processor, data.multiple_videos_per_text),
        processing_class=processor,
        evaluations=evaluations,
        max_skipped_ratio=data.max_skipped_ratio,
    )
    sections = (args, data, augmentation, evaluation, training)
    return fine_tune(trainer, dict(zip(SECTIONS, sections, strict=True)))


if __name__ == "__main__":
    main()
