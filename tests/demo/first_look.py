"""Makes what comes with the demo: `python -m tests.demo.first_look TEACHER` writes the clip and a teacher's saliency.

The teacher of the shipped file: `umt-hf data moving-shapes DATA --num-train-clips 800`, then
`python -m umt_hf.moving_shapes.tiny_clip --data DATA --output_dir TEACHER --patch_size 8 --num_train_clips 800
--max_steps 2000 --batch_size 32 --hidden_size 64 --num_hidden_layers 3 --num_attention_heads 2`.
"""

import sys
from pathlib import Path

import numpy as np

from umt_hf.demo.first_look import CLIP, SALIENCY
from umt_hf.demo.models import TeacherViewer
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_video

# Four times as fine as the clips of moving shapes.
SCALE = 4
DESCRIPTION = sample_clip(0, "test", 3)


def render_first_clip() -> np.ndarray:
    """Frames `(T, H, W, 3)` of the clip, and boxes of the shape."""
    return render_clip(DESCRIPTION, SCALE)


def write_first_look(teacher: str, clip: Path = CLIP, saliency: Path = SALIENCY) -> None:
    write_video(clip, render_first_clip()[0])
    viewer = TeacherViewer(teacher)
    pixel_values = viewer.processor(str(clip), return_tensors="pt")["pixel_values"]
    seen = viewer.teacher.encode(pixel_values)[1]
    np.save(saliency, seen.numpy().astype(np.float16))


if __name__ == "__main__":
    write_first_look(sys.argv[1])
