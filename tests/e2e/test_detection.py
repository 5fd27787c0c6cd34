"""Whole runs of action detection: overfitted, resumed, with adapters, tested in two processes, and the guide."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.e2e.runs import FINE_TUNING, save_student, to_flags
from tests.processes import run_ranks
from umt_hf import ActionDetector, UMTVideoForActionDetection, UMTVideoProcessor, cli
from umt_hf.data.ava_labels import AVA_LABELS
from umt_hf.evaluation import detection as evaluate_detection
from umt_hf.finetuning import detection as finetune_detection
from umt_hf.hub_cards.convert_umt_checkpoint import build_label_maps
from umt_hf.moving_shapes.render import write_moving_shapes, write_video
from umt_hf.runs.config import parse_config

from .conftest import ROOT


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, num_train_clips=16, num_validation_clips=6, num_test_clips=1)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"), num_frames=2)


@pytest.fixture
def fine_tune(shapes, student, tmp_path):
    """A run by the name of its folder; keyword arguments change it."""

    def run(name: str, **changes) -> dict[str, float]:
        fields = {
            **FINE_TUNING,
            "model_name_or_path": student,
            "train_data": shapes / "train_boxes.json",
            "validation_data": shapes / "train_boxes.json",
            "label_keys": ["color", "shape"],
            "output_dir": tmp_path / name,
            "short_side": 64,
            "sampling_strategy": "dense",
            "frame_stride": 1,
            "drop_path_rate": 0,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "seed": 1,
        }
        return finetune_detection.main(to_flags(**fields | changes))

    return run


def test_overfits_16_clips(fine_tune, tmp_path):
    still = {"horizontal_flip_probability": 0, "hue_degrees": 0, "saturation_jitter": 0, "value_jitter": 0}
    metrics = fine_tune("run", max_steps=120, **still)
    assert metrics["eval_map50"] > 0.99
    recipe = ["--config", str(tmp_path / "run" / "run.yaml")]
    _, data, augmentation, _ = parse_config(finetune_detection.SECTIONS, recipe)
    assert data.short_side == 64 and data.label_keys == ["color", "shape"] and augmentation.hue_degrees == 0
    saved = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert saved["eval_map50"] == pytest.approx(metrics["eval_map50"])


def test_a_resumed_run_equals_an_uninterrupted_one(fine_tune, tmp_path):
    """In the middle of the second epoch, with all of the published augmentation."""
    changes = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, "warmup_epochs": 0.5}
    fine_tune("whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    fine_tune("resumed", **changes, resume_from_checkpoint="auto")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)


def test_saved_adapters_give_the_merged_model(fine_tune, student, tmp_path):
    fine_tune("run", mode="lora", lora_rank=4, max_steps=4)
    merged = UMTVideoForActionDetection.from_pretrained(tmp_path / "run").eval()
    base = UMTVideoForActionDetection.from_pretrained(student, num_labels=merged.config.num_labels)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    clips, boxes = torch.randn(2, 2, 3, 64, 64), torch.tensor([[[3.0, 4, 40, 50]]] * 2)
    with torch.no_grad():
        expected = adapted(pixel_values=clips, boxes=boxes).logits
        torch.testing.assert_close(merged(clips, boxes).logits, expected, atol=1e-5, rtol=1e-4)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.allclose(tensor, before[name])}
    parts = ("q_proj.weight", "v_proj.weight", "vision_model.norm.weight", "vision_model.norm.bias")
    assert changed and all(name.endswith((*parts, "classifier.weight", "classifier.bias")) for name in changed)


def test_boxes_without_labels_are_refused(fine_tune):
    with pytest.raises(ValueError, match="no box has a label under labels.*--label_keys"):
        fine_tune("run", label_keys="labels")


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> Path:
    """Two movies of seconds in AVA's forms: key frames, a detector's boxes, ground truth, exclusions."""
    folder = tmp_path_factory.mktemp("ava")
    rng = np.random.default_rng(0)
    images, boxes, lines = [], [], []
    for movie, (height, width) in (("abc", (48, 64)), ("xyz", (64, 48))):
        (folder / movie).mkdir()
        for second in range(902, 907):
            write_video(folder / movie / f"{second}.mp4", rng.integers(0, 255, (4, height, width, 3), dtype=np.uint8))
            images.append(
                {"id": len(images), "movie": movie, "timestamp": second, "width": 2 * width, "height": 2 * height}
            )
            for x in range(second % 3 + 1):
                left = 10 + 20 * x
                boxes.append({"image_id": images[-1]["id"], "bbox": [left, 20, 30, 50], "score": 0.9})
                edges = [left / (2 * width), 10 / height, (left + 30) / (2 * width), 35 / height]
                lines += [f"{movie},{second:04d},{','.join(map(str, edges))},{label},{x}" for label in (12, 14 + x)]
    (folder / "val.json").write_text(json.dumps({"images": images, "annotations": []}))
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "val.csv").write_text("\n".join(lines) + "\n")
    (folder / "excluded.csv").write_text("xyz,0903\n")
    return folder


def test_two_processes_test_as_one(student, movies, tmp_path):
    """9 key frames of two shapes, one of them unreadable, in batches of two: the last is nobody's twice."""
    shutil.copytree(movies, tmp_path / "ava")
    (tmp_path / "ava" / "abc" / "904.mp4").write_bytes(b"no video")
    torch.manual_seed(3)
    model = UMTVideoForActionDetection.from_pretrained(student, **build_label_maps(AVA_LABELS))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "model")
    processor = UMTVideoProcessor.from_model_config(model.config, "detection", size={"shortest_edge": 48})
    processor.frame_stride = 1  # one frame before the key second: only its own file and the one before are read
    processor.save_pretrained(tmp_path / "model")
    files = {"data": "val.json", "detector_boxes": "boxes.json", "ground_truth": "val.csv", "excluded": "excluded.csv"}
    fields = {name: tmp_path / "ava" / file for name, file in files.items()}
    fields |= {"model_name_or_path": tmp_path / "model", "per_device_eval_batch_size": 2}
    fields |= {"dataloader_num_workers": 0, "max_skipped_ratio": 0.3}
    metrics = evaluate_detection.main(to_flags(**fields, output_dir=tmp_path / "one"))
    run_ranks(evaluate_detection.main, to_flags(**fields, output_dir=tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"] == metrics and two["num_processes"] == 2
    assert one["average_precision"] == two["average_precision"]
    results = [(tmp_path / name / "results.csv").read_text() for name in ("one", "two")]
    assert results[0] == results[1]
    assert one["num_key_frames"] == one["num_key_frames_with_truth"] == 9
    assert metrics["unreadable_videos"] == 2 and "904.mp4" in one["unreadable"][0]  # 904, and 905 that begins in it
    rows = [line.split(",") for line in results[0].splitlines()]
    seconds = {(row[0], row[1]) for row in rows}
    assert len(seconds) == 7 and ("abc", "0904") not in seconds and ("xyz", "0903") not in seconds
    assert set(one["average_precision"]) == {"stand", "walk", "answer phone"}  # brushing teeth does not count
    assert len(rows) == 80 * sum((int(second) % 3) + 1 for _, second in seconds)
    assert one["boxes"] == "detector"
    assert np.asarray(Image.open(tmp_path / "one" / "detections.png")).std() > 10

    report = evaluate_detection.main(to_flags(**fields, output_dir=tmp_path / "noisy", box_noise=0.3))
    assert report["map50"] != metrics["map50"]


def test_batch_mates_change_nothing(student, movies, tmp_path):
    """Clips of two shapes in one batch or each alone: the published code pads them for each other's sake."""
    model = UMTVideoForActionDetection.from_pretrained(student, **build_label_maps(AVA_LABELS))
    torch.nn.init.normal_(model.classifier.weight)
    processor = UMTVideoProcessor.from_model_config(model.config, "detection", size={"shortest_edge": 48})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    fields = {"model_name_or_path": tmp_path, "data": movies / "val.csv", "num_pictured": 0}
    for size in ("1", "16"):
        changes = {"per_device_eval_batch_size": size, "output_dir": tmp_path / size, "dataloader_num_workers": 0}
        evaluate_detection.main(to_flags(**fields | changes))
    alone, together = (np.loadtxt(tmp_path / size / "results.csv", delimiter=",", usecols=7) for size in ("1", "16"))
    np.testing.assert_allclose(alone, together, atol=2e-5)
    assert alone.std() > 0.1
    first = (tmp_path / "1" / "results.csv").read_text().splitlines()[:80]
    report = ActionDetector(tmp_path).detect(movies / "abc", [[5, 10, 20, 35]], key_seconds=902)
    found = {scored.label: scored.probability for scored in report.boxes[0].actions}
    assert len(found) == 80
    for line in first:
        label, score = line.split(",")[-2:]
        assert found[model.config.id2label[int(label) - 1]] == pytest.approx(float(score), abs=1e-4)


def test_commands_of_the_guide_run(shapes, student, tmp_path, monkeypatch, capsys):
    """Every command of docs/detection.md but those for AVA, and its Python."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(student, "outputs/umt-vit-b16")
    shutil.copytree(shapes / "videos", "boxes/videos")
    for split in ("train", "validation"):
        rows = json.loads((shapes / f"{split}_boxes.json").read_text())
        for row in rows:
            item = row["objects"][0]
            row["key_seconds"] = 1.5
            row["objects"] = [{"box": item["boxes"][12], "labels": ["run" if item["color"] < "m" else "stand"]}]
        Path(f"boxes/{split}.json").write_text(json.dumps(rows))
    for row in rows:
        row["objects"][0]["score"] = 0.9
    Path("boxes/detector.json").write_text(json.dumps(rows))
    shutil.copy(shapes / "videos" / "train" / "00000.mp4", "run.mp4")

    text = (ROOT / "docs" / "detection.md").read_text()
    commands = re.findall(r"^umt-hf .*", text.replace("\\\n", ""), re.MULTILINE)
    scripts = {"finetune": finetune_detection, "evaluate": evaluate_detection}
    counts = dict.fromkeys([*scripts, "umt-hf"], 0)
    for command in commands:
        if "ava" in command:
            continue
        words = shlex.split(command)[1:]
        if words[0] not in scripts:
            if words[0] == "data":
                words += ["--num-train-clips", "40", "--num-validation-clips", "4", "--num-test-clips", "1"]
            result = CliRunner().invoke(cli.app, words)
            assert result.exit_code == 0, result.output
            counts["umt-hf"] += 1
            continue
        group, verb, *arguments = words
        assert verb == "detection"
        quick = {**FINE_TUNING, "max_steps": 1} if group == "finetune" else {"dataloader_num_workers": 0}
        scripts[group].main([*arguments, *to_flags(**quick)])
        counts[group] += 1
    assert list(counts.values()) == [2, 3, 2]
    report = json.loads(Path("outputs/detector/test_detector/report.json").read_text())
    assert report["boxes"] == "detector" and report["num_boxes"] == 6
    assert json.loads(Path("outputs/shapes_detector/config.json").read_text())["hidden_size"] == 96
    capsys.readouterr()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})
    assert re.fullmatch(r"((run|stand) 0\.\d+\n){2}", capsys.readouterr().out)


def test_a_detector_that_gives_nan_detects_nothing(fine_tune, shapes, tmp_path):
    fine_tune("run", max_steps=1)
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    tensors["classifier.bias"][1] = float("inf")
    save_file(tensors, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    flags = {"data": shapes / "train_boxes.json", "label_keys": ["color", "shape"], "dataloader_num_workers": 0}
    flags |= {"model_name_or_path": tmp_path / "run", "output_dir": tmp_path / "test"}
    with pytest.raises(ValueError, match=r"run: what it computes for \d+ of \d+ boxes is NaN or infinite \(a box of "):
        evaluate_detection.main(to_flags(**flags))
    assert not (tmp_path / "test").exists()
    row = json.loads((shapes / "train_boxes.json").read_text())[0]
    video = str(shapes / row["video"])
    with pytest.raises(ValueError, match=r"boxes is NaN or infinite \(box \[2, 2"):
        ActionDetector(tmp_path / "run").detect(video, [[2, 2, 30, 30]], key_frame=2)
    command = ["detect", video, "--model", str(tmp_path / "run"), "--boxes", "2,2,30,30", "--frame", "2"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2 and "NaN" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("names.txt", "red\nblue\n"), ("names.json", '{"blue": 1, "red": 0}'), ("n.csv", "1,blue\n0,red")],
)
def test_class_names_of_detection_take_every_form(shapes, student, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    fields = {"model_name_or_path": student, "train_data": shapes / "train_boxes.json", "class_names": tmp_path / name}
    fields |= {"validation_data": shapes / "train_boxes.json", "label_keys": ["color"], "output_dir": tmp_path / "run"}
    with pytest.raises(
        ValueError, match="green|yellow|not .*class"
    ):  # names were read: other colours are not among them
        finetune_detection.main(to_flags(**FINE_TUNING, **fields))
    with pytest.raises(ValueError, match="metric_for_best_model=eval_map: .*map50"):
        finetune_detection.main(to_flags(**FINE_TUNING, **fields, metric_for_best_model="eval_map"))
