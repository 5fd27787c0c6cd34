"""Vectors to search among: random directions, or those of a model for rendered clips, grown to any number.

python -m benchmarks.search.vectors --model outputs/moving_shapes/video_text --num_windows 20000 --output vectors.npz
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import HfArgumentParser

from umt_hf.inference.search import VideoTextEncoder
from umt_hf.moving_shapes.render import render_clip, sample_clip

NEIGHBOURS = 5
BLOCK = 2000


@dataclass(kw_only=True)
class Arguments:
    """What to encode."""

    model: str = field(metadata={"help": "Folder of a dual encoder, such as that of `make demo`."})
    num_windows: int = field(default=20_000, metadata={"help": "Clips that are rendered and encoded."})
    num_queries: int = field(default=200, metadata={"help": "Captions of other clips that are encoded."})
    batch_size: int = field(default=64, metadata={"help": "Clips at a time."})
    seed: int = field(default=0, metadata={"help": "Of the clips."})
    output: str = field(default="vectors.npz", metadata={"help": "File to write."})


def draw_unit_vectors(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Draw float32 `(count, width)` in directions that are spread evenly."""
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@torch.inference_mode()
def encode_clips(args: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of rendered clips `(windows, D)` and of captions of others `(queries, D)`, float32."""
    encoder = VideoTextEncoder(args.model)
    vectors = []
    for start in range(0, args.num_windows, args.batch_size):
        rows = range(start, min(start + args.batch_size, args.num_windows))
        clips = [render_clip(sample_clip(args.seed, "test", row))[0] for row in rows]
        pixels = encoder.processor.video_processor(clips, num_frames=encoder.num_frames, return_tensors="pt")
        vectors.append(encoder.encode_videos(pixels["pixel_values"])[0].cpu().numpy())
    captions = {sample_clip(args.seed, "validation", row).caption for row in range(4 * args.num_queries)}
    texts = [encoder.encode_text(caption)[0].cpu().numpy() for caption in sorted(captions)[: args.num_queries]]
    return np.concatenate(vectors), np.concatenate(texts)


def grow(vectors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Make more vectors that are as near each other as those there are: each new one is between two neighbours.

    Args:
        vectors: Float32 `(windows, D)`.
        count: How many are wanted; the first ones are those given.
        seed: Of the choice.

    Returns:
        Float32 `(count, D)`, as long as a vector between the two is.
    """
    if count <= len(vectors):
        return vectors[:count]
    rng = np.random.default_rng(seed)
    near = find_neighbours(vectors)
    first = rng.integers(len(vectors), size=count - len(vectors))
    second = near[first, rng.integers(near.shape[1], size=len(first))]
    share = rng.random((len(first), 1), dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1)[:, None]
    mixed = share * vectors[first] + (1 - share) * vectors[second]
    mixed *= (share * lengths[first] + (1 - share) * lengths[second]) / np.linalg.norm(mixed, axis=1, keepdims=True)
    return np.concatenate([vectors, mixed])


def find_neighbours(vectors: np.ndarray) -> np.ndarray:
    """The nearest other vectors of each, `(windows, NEIGHBOURS)`."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    found = []
    for start in range(0, len(vectors), BLOCK):
        scores = vectors[start : start + BLOCK] @ vectors.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        found.append(np.argpartition(-scores, count - 1, axis=1)[:, :count])
    return np.concatenate(found)


def main() -> None:
    """Write the file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    vectors, queries = encode_clips(args)
    np.savez(args.output, vectors=vectors, queries=queries)
    print(f"{args.output}: {vectors.shape[0]} vectors and {len(queries)} queries, {vectors.shape[1]} wide")


if __name__ == "__main__":
    main()
