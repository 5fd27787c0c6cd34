"""Score generated videos as the dimension `human_action` of VBench does: does each show the action in its name?

    python examples/vbench_human_action.py --model umt-vit-l16-k400-f16 --videos "a person is marching-0.mp4"

The model is the one that VBench takes, converted by `umt-hf convert`; docs/vbench.md says what is reproduced.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import umt_hf  # noqa: F401 (registers the models with the Auto classes)

# The middle frame of each of 16 parts, the shorter side 256 pixels, its centre; one view.
PREPARATION = {"num_frames": 16, "sampling_strategy": "middle", "size": {"shortest_edge": 256}, "crop_size": 224}
VIEWS = {"num_clips": 1, "num_crops": 1}
NUM_BEST, THRESHOLD = 5, 0.85


def read_action(video: str) -> str:
    """The action that a video should show: `A person is marching-0.mp4` -> `marching`."""
    return Path(video).name.lower().split("-")[0].split("person is ")[-1].split("_")[0].removesuffix(".mp4")


def main() -> None:
    """Print a line for each video, then the share of those that show what they should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--videos", nargs="+", required=True, help="Files named like their prompts.")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoVideoProcessor.from_pretrained(args.model, **PREPARATION, **VIEWS)
    model = AutoModelForVideoClassification.from_pretrained(args.model).eval().to(device)
    classes = {label.lower() for label in model.config.id2label.values()}
    num_right = 0
    for video in args.videos:
        try:
            inputs = processor(video, return_tensors="pt").to(device)
        except ValueError as error:  # it cannot be read, and counts as wrong
            print(json.dumps({"video": video, "is_right": False, "error": str(error)}))
            continue
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        best = logits.float().sigmoid().topk(NUM_BEST)  # a sigmoid, though the head was trained by a softmax
        found = [(model.config.id2label[i], round(p, 4)) for p, i in zip(*(x.tolist() for x in best), strict=True)]
        action = read_action(video)
        is_right = action in [label.lower() for label, probability in found if probability >= THRESHOLD]
        num_right += is_right
        said = {"video": video, "action": action, "is_class": action in classes, "is_right": is_right, "best": found}
        print(json.dumps(said))
    print(f"{num_right} of {len(args.videos)}: {num_right / len(args.videos):.4f}")


if __name__ == "__main__":
    main()
