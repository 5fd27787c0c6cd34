"""Train a tiny CLIP on moving shapes: the teacher of the embedded default, since no weights ship.

`python -m umt_hf.moving_shapes.tiny_clip --data DIR --output_dir DIR` matches single frames with captions
such as "a red circle at the top left" and saves a folder that Transformers' CLIP classes load. Captions name only
colour, shape and place, so the class token learns to attend to the shape and nothing about motion can leak in.
"""

import itertools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..processing.decoding import open_video
from ..runs.arguments import NamedDataArguments, PatchArguments, ProjectionArguments, TowerSizeArguments
from ..runs.config import REQUIRED, describe, require, script, set_defaults
from ..training.optimization import compute_learning_rate
from .render import COLORS, FRAME_SIZE, SHAPES

logger = logging.getLogger(__name__)

ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("leftmost", "left", "right", "rightmost")
ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "row": ROWS, "column": COLUMNS}
CAPTIONS = tuple(
    f"a {color} {shape} at the {row} {column}" for color, shape, row, column in itertools.product(*ATTRIBUTES.values())
)
_CAPTION_GRID = tuple(len(words) for words in ATTRIBUTES.values())


@dataclass(kw_only=True)
@set_defaults(
    data=REQUIRED,
    patch_size=16,
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=3,
    projection_dim=64,
)
class TinyCLIPArguments(NamedDataArguments, PatchArguments, TowerSizeArguments, ProjectionArguments):
    """Folder written by moving_shapes, sizes of the vision tower, and how long it is trained."""

    output_dir: str = field(metadata={"help": "Folder for the finished CLIP: model, tokenizer and image processor."})
    seed: int = describe(0, "Seed of weights and batches.")
    num_train_clips: int = describe(1500, "Training clips whose frames are used.")
    max_steps: int = describe(1600, "Optimizer steps.")
    batch_size: int = describe(64, "Frames in a step.")
    learning_rate: float = describe(1e-3, "Peak of a half cosine; a tenth of the steps warms up.")
    weight_decay: float = describe(0.05, "AdamW decay of matrices.")


SECTIONS = {"training": TinyCLIPArguments}


@dataclass
class LabeledFrames:
    """Frames in memory: `pixels (frames, 3, height, width)`, uint8, and each one's caption, an index of `CAPTIONS`."""

    pixels: torch.Tensor
    caption_ids: torch.Tensor


def train_teacher(args: TinyCLIPArguments) -> dict[str, float]:
    """Train a CLIP from scratch and save it to `args.output_dir`.

    Returns:
        Zero-shot accuracy on validation frames for each attribute: `color`, `shape`, `row`, `column`.
    """
    set_seed(args.seed)
    tokenizer = build_word_tokenizer()
    model = build_clip(args, tokenizer)
    data = Path(require(args.data, "data"))
    train = load_frames(data, "train", args.num_train_clips)
    fit(model, tokenizer, train, args)
    accuracy = compute_zero_shot_accuracy(model, tokenizer, load_frames(data, "validation", 100))
    logger.info("Zero-shot accuracy on validation frames: %s", accuracy)
    save_clip(model, tokenizer, Path(args.output_dir))
    return accuracy


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the captions' words, with CLIP's `<bos> words <eos>`."""
    # CLIPTextModel reads eos_token_id 2 as a legacy config and would pool elsewhere, so <eos> must not be third.
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build_clip(args: TinyCLIPArguments, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP of a few hundred thousand parameters with fresh weights."""
    vision = {
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "image_size": FRAME_SIZE,
        "patch_size": args.patch_size,
        "projection_dim": args.projection_dim,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": args.projection_dim,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=args.projection_dim))
    # At CLIP's own 0.02 the place of a patch is too faint to be learned in a minute: row and column stay at chance.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    return model


def load_frames(data: Path, split: str, num_clips: int) -> LabeledFrames:
    """Decode the first `num_clips` clips of a split and name what each frame shows."""
    pixels, caption_ids = [], []
    annotation = data / f"{split}_boxes.json"
    if not annotation.is_file():
        raise FileNotFoundError(
            f"{annotation}: no moving shapes there; `umt-hf data moving-shapes {data}` makes them."
        )
    annotations = json.loads(annotation.read_text(encoding="utf-8"))[:num_clips]
    for clip in tqdm(annotations, desc=f"decoding {split} frames", unit="clip"):
        (shape,) = clip["objects"]
        indices = range(0, len(shape["boxes"]), 2)  # neighbouring frames are all but the same
        with open_video(data / clip["video"]) as reader:
            pixels.append(reader.get_frames(indices))
        caption_ids += [_compute_caption_id(shape, shape["boxes"][i], clip["width"], clip["height"]) for i in indices]
    return LabeledFrames(
        pixels=torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).contiguous(),
        caption_ids=torch.tensor(caption_ids),
    )


def fit(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, frames: LabeledFrames, args: TinyCLIPArguments) -> None:
    """Minimise CLIP's contrastive loss; frames of one caption in a batch are all positives of each other."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    progress = tqdm(range(args.max_steps), desc="training teacher", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(
                step,
                peak=args.learning_rate,
                minimum=0.0,
                total_steps=args.max_steps,
                warmup_steps=args.max_steps // 10,
            )
        batch = torch.randint(len(frames.pixels), (args.batch_size,), generator=generator)
        caption_ids = frames.caption_ids[batch]
        outputs = model(pixel_values=normalize(frames.pixels[batch]), **tokenize(tokenizer, caption_ids.tolist()))
        loss = compute_contrastive_loss(outputs.logits_per_image, caption_ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def compute_contrastive_loss(logits_per_image: torch.Tensor, caption_ids: torch.Tensor) -> torch.Tensor:
    """Mean of both directions' cross entropy, the target spread evenly over the pairs of equal caption.

    Args:
        logits_per_image: `(batch, batch)`.
        caption_ids: `(batch,)`.
    """
    positives = (caption_ids[:, None] == caption_ids[None, :]).float()
    targets = positives / positives.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_image.T, targets)) / 2


@torch.no_grad()
def compute_zero_shot_accuracy(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, frames: LabeledFrames
) -> dict[str, float]:
    """Pick the best of all captions for each frame and score its words one attribute at a time."""
    pixels = normalize(frames.pixels)
    logits = model(pixel_values=pixels, **tokenize(tokenizer, range(len(CAPTIONS)))).logits_per_image
    predicted = np.unravel_index(logits.argmax(dim=1).numpy(), _CAPTION_GRID)
    actual = np.unravel_index(frames.caption_ids.numpy(), _CAPTION_GRID)
    return {name: float((p == a).mean()) for name, p, a in zip(ATTRIBUTES, predicted, actual, strict=True)}


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Save a folder for CLIPModel, CLIPVisionModelWithProjection, AutoTokenizer and CLIPImageProcessor."""
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    side = model.vision_model.config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(output_dir)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Bring uint8 frames `(frames, 3, height, width)` to ImageNet's statistics, which the student's input has too."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels.float() / 255 - mean) / std


def tokenize(tokenizer: PreTrainedTokenizerFast, caption_ids: list[int] | range) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of captions; all have the same length."""
    encoding = tokenizer([CAPTIONS[i] for i in caption_ids], return_tensors="pt")
    return {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"]}


def _compute_caption_id(shape: dict, box: list[int], width: int, height: int) -> int:
    row = int((box[1] + box[3]) / 2 / height * len(ROWS))
    column = int((box[0] + box[2]) / 2 / width * len(COLUMNS))
    appearance = [ATTRIBUTES[name].index(shape[name]) for name in ("color", "shape")]
    return int(np.ravel_multi_index([*appearance, row, column], _CAPTION_GRID))


@script(SECTIONS)
def main(args: TinyCLIPArguments) -> dict[str, float]:
    """Train; returns what `train_teacher` does."""
    return train_teacher(args)


if __name__ == "__main__":
    main()
