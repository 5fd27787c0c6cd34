"""Classify videos without training: each class is a text, and the most similar one is the answer.

    python examples/zero_shot.py --model umt-vit-b16-25m --videos a.mp4 b.mp4 --classes "playing guitar" "cooking"

The model is a video-text folder: stage 2 or retrieval. A class's vector is the mean over the prompts.
"""

import argparse

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor

import umt_hf  # noqa: F401 (registers the models with the Auto classes)


@torch.no_grad()
def main() -> None:
    """Print the probability of every class for each video."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--videos", nargs="+", required=True, help="Files or URLs.")
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="+", default=["a video of {}"], help="Texts with {} for the class.")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).eval()
    texts = [prompt.format(name) for name in args.classes for prompt in args.prompts]
    vectors = normalize(model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output, dim=-1)
    vectors = normalize(vectors.unflatten(0, (len(args.classes), -1)).mean(dim=1), dim=-1)
    for video in args.videos:
        inputs = processor(videos=[video], return_tensors="pt")
        # The mean of the frames' unit vectors, which is not normalised again.
        similarity = model.get_video_features(**inputs).pooler_output[0] @ vectors.T
        print(video)
        for score, name in sorted(zip((similarity / model.temperature).softmax(dim=0), args.classes, strict=True))[
            ::-1
        ]:
            print(f"  {score:.3f}  {name}")


if __name__ == "__main__":
    main()
