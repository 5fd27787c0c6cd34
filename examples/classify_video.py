"""Print the likeliest classes of videos.

    python examples/classify_video.py --model umt-vit-b16-k400 --videos a.mp4 b.mp4 --top_k 3

The model is a classifier: a folder that `umt-hf convert`, `finetune_folder.py` or `umt_hf.finetuning.classification`
has written.
"""

import argparse

from umt_hf import VideoClassifier


def main() -> None:
    """Classify one video after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--videos", nargs="+", required=True, help="Files or URLs.")
    parser.add_argument("--top_k", type=int, default=5, help="How many classes per video.")
    parser.add_argument("--num_clips", type=int, default=1, help="Clips per video whose probabilities are averaged.")
    parser.add_argument("--num_crops", type=int, default=1, help="Crops per clip, likewise; published tests take 3.")
    args = parser.parse_args()

    classifier = VideoClassifier(args.model)  # loads once, answers often
    for video in args.videos:
        print(video)
        for found in classifier.classify(video, args.top_k, num_clips=args.num_clips, num_crops=args.num_crops):
            print(f"  {found.probability:.3f}  {found.label}")


if __name__ == "__main__":
    main()
