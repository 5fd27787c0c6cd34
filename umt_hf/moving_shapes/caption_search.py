"""What stage 2 taught: the held-out clips of the embedded data are searched by their captions, before and after it.

    python -m umt_hf.moving_shapes.caption_search --output_dir outputs/moving_shapes

Reads the folders `data`, `student`, `text_tower` and `video_text` that `tour` leaves; writes recalls and pictures
beside them. The text tower starts from scratch, so all that is known of words comes from the training captions.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import Accelerator

from ..data.annotations import RetrievalSet, load_retrieval_set
from ..evaluation.retrieval import (
    RetrievalFeatures,
    encode_retrieval_set,
    match_candidates,
    rank_by_similarity,
    rerank_candidates,
)
from ..inference.held_out import HeldOutVideos
from ..inference.loading import load_complete_model, load_video_text_processor
from ..modeling.losses_umt import compute_similarity
from ..modeling.modeling_umt_video_text import UMTVideoTextForRetrieval
from ..plots import STAGE_2_CURVES, FoundVideo, plot_found_videos, plot_losses
from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..runs.folder import METRICS_FILE
from ..runs.preflight import name_folder
from .render import APPEARANCES, MOTIONS, render_clip, sample_clip, write_video

NUM_QUARTETS = 100
ROWS = {
    "before": "before stage 2: student, fresh text tower and projections",
    "dual": "after stage 2, dual encoder",
    "reranked": "after stage 2, re-ranked by the matching head",
}
COLUMNS = {
    "all": "text to video, R@1 among all held-out clips",
    "motion": "text to video, R@1 among 4 clips that differ only in motion",
    "appearance": "video to text, R@1 among 36 captions that differ only in appearance",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and evaluate.

    Args:
        arguments: Command line; `None` = the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=name_folder, default=Path("outputs/moving_shapes"), help="Folder of the tour."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of its data.")
    parser.add_argument("--num_quartets", type=int, default=NUM_QUARTETS, help="Clips rendered with each motion.")
    args = parser.parse_args(arguments)
    measure_caption_search(args.output_dir, args.seed, args.num_quartets)


def measure_caption_search(folder: Path, seed: int, num_quartets: int = NUM_QUARTETS) -> None:
    """Search the held-out clips by their captions, before and after stage 2, and draw what is found.

    Args:
        folder: Folder of the tour.
        seed: Seed of its data.
        num_quartets: Clips that are rendered with each of the four motions.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    after = load_complete_model(UMTVideoTextForRetrieval, folder / "video_text").eval()
    processor = load_video_text_processor(folder / "video_text")
    text_config = after.config.text_config
    names = ("fusion_layer", "pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    before = UMTVideoTextForRetrieval.from_vision_text_pretrained(
        folder / "student",
        folder / "text_tower",
        vision_fields={"num_frames": after.vision_model.config.num_frames},
        text_fields={name: getattr(text_config, name) for name in names},
        projection_dim=after.config.projection_dim,
    )
    assert isinstance(before, UMTVideoTextForRetrieval)  # without the report of what was loaded
    before.eval()
    clips = load_retrieval_set(str(folder / "data" / "test_captions.json"), multiple_videos_per_text=True)
    quartets = write_quartets(folder / "quartets", seed, num_quartets)

    recall = {row: {} for row in ROWS}
    for model, rows in ((before, {"before": "dual"}), (after, {"dual": "dual", "reranked": "reranked"})):
        features, recall_of_all = search_captions(model, processor, clips, accelerator)
        motion = search_quartets(model, processor, quartets, accelerator)
        for row, scores in rows.items():
            recall[row] = {"all": recall_of_all[scores], "motion": motion[scores]}
            if scores == "dual":
                recall[row]["appearance"] = name_appearances(model, processor, clips, features)
            typer.echo(f"  {ROWS[row]}: " + ", ".join(f"{k} {v:.3f}" for k, v in recall[row].items()))
    chance = statistics.mean(len(videos) for videos in clips.videos_of_text) / len(clips.videos)
    chance = {"all": chance, "motion": 1 / 4, "appearance": 1 / 36}
    results = {"recall": recall, "chance": chance, "num_clips": len(clips.videos), "num_texts": len(clips.texts)}
    (folder / "results_stage2.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_losses(folder / "video_text" / METRICS_FILE, folder / "losses_stage2.png", STAGE_2_CURVES, "loss")
    draw_found(folder, processor, clips, features)


def search_captions(
    model: UMTVideoTextForRetrieval, processor: UMTVideoTextProcessor, clips: RetrievalSet, accelerator: Accelerator
) -> tuple[RetrievalFeatures, dict[str, float]]:
    """Features of all clips and captions, and R@1 of searching the clips by either score."""
    right = clips.videos_of_text
    features = encode_retrieval_set(model, processor, clips, accelerator, batch_size=50, num_workers=1)
    ranks, candidates = rank_by_similarity(features.text_embeds, features.video_embeds, right, accelerator, top_k=16)
    first_texts = torch.zeros(len(clips.videos), 1, dtype=torch.long)  # the other direction is not asked for
    matching, _ = match_candidates(model, features, candidates, first_texts, accelerator, batch_size=200)
    ranks = {"dual": ranks, "reranked": rerank_candidates(ranks, candidates, matching, right)}
    return features, {scores: (values == 1).float().mean().item() for scores, values in ranks.items()}


@torch.no_grad()
def name_appearances(
    model: UMTVideoTextForRetrieval,
    processor: UMTVideoTextProcessor,
    clips: RetrievalSet,
    features: RetrievalFeatures,
) -> float:
    """Share of clips whose caption is the most similar of the 36 that have the clip's own motion."""
    captions = [f"a {appearance} moving {motion}" for motion in MOTIONS for appearance in APPEARANCES]
    embeds = model.get_text_features(**processor(text=captions, return_tensors="pt")).pooler_output
    right = torch.tensor([captions.index(clips.texts[texts[0]]) for texts in clips.texts_of_video])
    candidates = (right // len(APPEARANCES) * len(APPEARANCES))[:, None] + torch.arange(len(APPEARANCES))
    similarity = compute_similarity(features.video_embeds, embeds).gather(1, candidates)
    return (similarity.argmax(1) == right % len(APPEARANCES)).float().mean().item()


def write_quartets(folder: Path, seed: int, num_quartets: int) -> RetrievalSet:
    """Render held-out clips with each of the four motions: same shape, place and background, other order of frames."""
    folder.mkdir(exist_ok=True)
    videos, texts = [], []
    for number in range(num_quartets):
        clip = sample_clip(seed, "test", number)
        for i, motion in enumerate(MOTIONS):
            moved = dataclasses.replace(clip, motion=motion)
            path = folder / f"{number:03d}_{i}.mp4"
            if not path.is_file():
                write_video(path, render_clip(moved)[0])
            videos.append(str(path))
            texts.append(moved.caption)
    own = [[i] for i in range(len(videos))]
    return RetrievalSet(videos, texts, own, own)


def search_quartets(
    model: UMTVideoTextForRetrieval, processor: UMTVideoTextProcessor, quartets: RetrievalSet, accelerator: Accelerator
) -> dict[str, float]:
    """Share of captions whose clip is the first of its quartet, by either score."""
    features = encode_retrieval_set(model, processor, quartets, accelerator, batch_size=50, num_workers=1)
    rows = torch.arange(len(quartets.videos))
    candidates = (rows // 4 * 4)[:, None] + torch.arange(4)
    similarity = (features.text_embeds[:, None] * features.video_embeds[candidates]).sum(-1)
    matching, _ = match_candidates(model, features, candidates, candidates, accelerator, batch_size=200)
    is_first = {"dual": similarity.argmax(1), "reranked": matching.argmax(1)}
    return {name: (place == rows % 4).float().mean().item() for name, place in is_first.items()}


def draw_found(
    folder: Path, processor: UMTVideoTextProcessor, clips: RetrievalSet, features: RetrievalFeatures
) -> None:
    """The clip that the dual encoder finds first for each of five captions, evenly spread over the held-out ones."""
    found = []
    for text in range(0, len(clips.texts), len(clips.texts) // 5)[:5]:
        video = int((features.video_embeds @ features.text_embeds[text]).argmax())
        pixel_values = HeldOutVideos([clips.videos[video]], processor.video_processor)[0]
        caption = clips.texts[clips.texts_of_video[video][0]]
        is_right = video in clips.videos_of_text[text]
        found.append(FoundVideo(clips.texts[text], caption, is_right, pixel_values))
    plot_found_videos(found, folder / "retrieval.png")


def format_search_table(results: Sequence[dict[str, Any]]) -> str:
    """Recall before and after, as mean and spread over seeds."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for row, name in ROWS.items():
        cells = []
        for column in COLUMNS:
            values = [result["recall"][row][column] for result in results if column in result["recall"][row]]
            if not values:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    chance = [statistics.mean(result["chance"][column] for result in results) for column in COLUMNS]
    lines.append("| chance | " + " | ".join(f"{value:.3f}" for value in chance) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
