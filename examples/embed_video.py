"""Turn each video into one vector, and find for each the video that is most like it.

    python examples/embed_video.py --model umt-vit-b16 --videos a.mp4 b.mp4 c.mp4 --out vectors.parquet

The model is a folder of `umt-hf convert` or of a run: stage 1, or a classifier.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModel, AutoVideoProcessor

import umt_hf  # noqa: F401 (registers the models with the Auto classes)


def main() -> None:
    """Embed the videos, write a table of vectors, print the nearest neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--videos", nargs="+", required=True, help="Files or URLs.")
    parser.add_argument("--out", help="Parquet file with the columns `video` and `vector`.")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoVideoProcessor.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).eval().to(device)
    vectors = []
    for video in args.videos:
        inputs = processor(video, return_tensors="pt").to(device)
        with torch.no_grad():
            vectors.append(model(**inputs).pooler_output[0].float().cpu())  # the mean over all tokens
    vectors = torch.stack(vectors)
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers")

    if args.out:
        Dataset.from_dict({"video": args.videos, "vector": vectors.tolist()}).to_parquet(args.out)
    if len(vectors) > 1:
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-1)
        for video, cosine, nearest in zip(args.videos, *similarity.max(dim=1), strict=True):
            print(f"{video}: most like {args.videos[nearest]} ({cosine:.3f})")


if __name__ == "__main__":
    main()
