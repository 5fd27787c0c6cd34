"""AVA's files and plain JSON lists of key frames; results in AVA's format, their mAP by hand; recipes."""

import json
from pathlib import Path

import numpy as np
import pytest

from umt_hf import UMTVideoProcessor
from umt_hf.data.ava_labels import AVA_EVALUATED_IDS, AVA_LABELS
from umt_hf.data.key_frames import (
    KeyFrame,
    build_key_frame_table,
    load_detections,
    load_key_frames,
    read_exclusions,
    read_label_map,
)
from umt_hf.evaluation.detection import DetectedActions, compute_detection_metrics, load_detection_data, write_results
from umt_hf.finetuning import detection as finetune_detection
from umt_hf.hub_cards.convert_umt_checkpoint import build_published_config
from umt_hf.runs.config import list_recipes, parse_config
from umt_hf.training.optimization import scale_learning_rate

FIXTURES = Path(__file__).parents[2] / "fixtures" / "single_modality"
CSV = """\
abc,0902,0.100,0.200,0.500,0.800,12,0
abc,0902,0.100,0.200,0.500,0.800,80,0
abc,0902,0.600,0.200,0.900,0.800,2,1
abc,0903,,,,,,
xyz,1000,0.000,0.000,0.500,1.000,14,2
"""
IMAGES = [
    {"id": 7, "movie": "abc", "timestamp": 902, "width": 200, "height": 100},
    {"id": 8, "movie": "abc", "timestamp": 903, "width": 999, "height": 999},  # the movie's first image counts
    {"id": 9, "movie": "xyz", "timestamp": 1000, "width": 100, "height": 100},
]


@pytest.fixture
def ava(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    annotations = [
        {"image_id": 7, "bbox": [20, 20, 80, 60], "action_ids": [12, 80]},
        {"image_id": 7, "bbox": [190, -10, 50, 30], "action_ids": [2]},  # cut at the frame
        {"image_id": 9, "bbox": [100, 0, 10, 10], "action_ids": [3]},  # nothing left
    ]
    (tmp_path / "train.json").write_text(json.dumps({"images": IMAGES, "annotations": annotations}))
    (tmp_path / "abc").mkdir()
    (tmp_path / "xyz.mkv").touch()
    return tmp_path


def test_csv_of_ava(ava):
    frames, names = load_key_frames(ava / "train.csv")
    assert names == list(AVA_LABELS) and [frame.key for frame in frames] == [
        ("abc", "0902"),
        ("abc", "0903"),
        ("xyz", "1000"),
    ]
    first = frames[0]
    assert first.boxes == [[0.1, 0.2, 0.5, 0.8], [0.6, 0.2, 0.9, 0.8]] and first.labels == [[11, 79], [1]]
    assert (first.width, first.height, first.key_seconds) == (1, 1, 902.0)
    assert frames[1].boxes == [] and frames[2].labels == [[13]]
    assert first.video == str(ava / "abc") and frames[2].video == str(ava / "xyz.mkv")
    (ava / "train.csv").write_text(CSV + "abc,0904,0.1,0.2,0.3\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 6"):
        load_key_frames(ava / "train.csv")


def test_published_json_of_ava(ava):
    frames, _ = load_key_frames(ava / "train.json")
    assert frames[0].boxes == [[20, 20, 100, 80], [190, 0, 200, 20]] and frames[0].labels == [[11, 79], [1]]
    assert (frames[1].width, frames[1].height) == (200, 100) and frames[2].boxes == []
    (ava / "train.json").write_text(json.dumps({"images": [{"id": 1}]}))
    with pytest.raises(ValueError, match="movie"):
        load_key_frames(ava / "train.json")


def test_boxes_of_a_detector(ava):
    frames, _ = load_key_frames(ava / "train.json")
    boxes = [
        {"image_id": 7, "bbox": [10, 10, 30, 30], "score": 0.95},
        {"image_id": 7, "bbox": [50, 10, 30, 30], "score": 0.5},
        {"image_id": 9, "bbox": [0, 0, 50, 50], "score": 0.8},
    ]
    (ava / "boxes.json").write_text(json.dumps(boxes))
    found = load_detections(ava / "boxes.json", frames, ava / "train.json")
    assert [(frame.key, frame.boxes, frame.scores) for frame in found] == [
        (("abc", "0902"), [[10, 10, 40, 40]], [0.95]),
        (("xyz", "1000"), [[0, 0, 50, 50]], [0.8]),
    ]
    assert found[0].labels == [[]] and len(frames[0].boxes) == 2
    with pytest.raises(ValueError, match="no box"):
        load_detections(ava / "boxes.json", frames, ava / "train.json", min_score=0.99)
    with pytest.raises(ValueError, match="AVA's JSON form"):
        load_detections(ava / "boxes.json", frames, ava / "train.csv")


def test_exclusions_and_label_map(tmp_path):
    (tmp_path / "excluded.csv").write_text("abc,0903\nxyz,1000\n")
    assert read_exclusions(tmp_path / "excluded.csv") == {("abc", "0903"), ("xyz", "1000")}
    (tmp_path / "a.pbtxt").write_text('label {\n  name: "stand"\n  label_id: 12\n}\n')
    (tmp_path / "b.pbtxt").write_text('item {\n  name: "walk"\n  id: 14\n}\nitem {\n  name: "sit"\n  id: 11\n}\n')
    assert read_label_map(tmp_path / "a.pbtxt") == [11] and read_label_map(tmp_path / "b.pbtxt") == [13, 10]
    (tmp_path / "c.pbtxt").write_text("nothing")
    with pytest.raises(ValueError, match=r"c\.pbtxt"):
        read_label_map(tmp_path / "c.pbtxt")


OWN = [
    {
        "video": "a.mp4",
        "key_seconds": 2.5,
        "objects": [
            {"box": [1, 2, 30, 40], "labels": ["wave", "run"]},
            {"box": [50, 2, 60, 40], "labels": "run", "score": 0.5},
        ],
    },
    {"video": "b.mp4", "key_frame": 3, "width": 64, "height": 48, "objects": [{"box": [0, 0, 9, 9], "labels": []}]},
    {"video": "c.mp4", "objects": [{"boxes": [[i, 0, 9, 9] for i in range(5)], "color": "red", "labels": ["run"]}]},
]


def test_own_json(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN))
    frames, names = load_key_frames(path)
    assert names == ["run", "wave"]
    assert [frame.moment for frame in frames] == ["2.5", "frame 3", "frame 2"]
    assert frames[0].labels == [[1, 0], [0]] and frames[0].scores == [1.0, 0.5] and frames[0].width == 0
    assert frames[1].labels == [[]] and (frames[1].width, frames[1].height) == (64, 48)
    assert frames[2].boxes == [[2, 0, 9, 9]] and frames[2].video == str(tmp_path / "c.mp4")
    assert load_key_frames(path, label_keys=["color"])[0][2].labels == [[0]]
    rows = build_key_frame_table(frames)
    assert rows[0]["key_frame"] is None and rows[1]["key_frame"] == 3 and rows[0]["labels"] == [[1, 0], [0]]
    with pytest.raises(ValueError, match=r"object 0: the labels \['wave'\] are not classes"):
        load_key_frames(path, class_names=["run"])


@pytest.mark.parametrize(
    "content,message",
    [
        ({"a": 1}, "expected a JSON list"),
        ([{"video": "a.mp4", "key_frame": 0, "objects": [{"box": [5, 5, 2, 9]}]}], r"object 0.*empty"),
        ([{"video": "a.mp4", "objects": [{"box": [5, 5, 2, 9]}]}], r"object 0.*key_frame.*boxes"),
        ([{"key_frame": 0, "objects": []}], r"object 0.*'video'"),
        ([], "no key frames"),
        ([OWN[1], OWN[1]], "occurs twice"),
    ],
)
def test_malformed_lists(tmp_path, content, message):
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_key_frames(tmp_path / "own.json")
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        load_key_frames(tmp_path / "other.json")


def test_map_and_results_by_hand(ava):
    """Truth: stand and watch in one box of abc, crawl (not evaluated), walk in xyz, which has no detection."""
    boxes = [
        {"image_id": 7, "bbox": [20, 20, 80, 60], "score": 0.9},
        {"image_id": 7, "bbox": [120, 20, 60, 60], "score": 0.8},
        {"image_id": 8, "bbox": [0, 0, 50, 50], "score": 1.0},
    ]
    (ava / "boxes.json").write_text(json.dumps(boxes))
    (ava / "excluded.csv").write_text("abc,0903\n")
    data = load_detection_data(
        str(ava / "train.json"),
        class_names=AVA_LABELS,
        detector_boxes=str(ava / "boxes.json"),
        ground_truth=str(ava / "train.csv"),
        excluded=str(ava / "excluded.csv"),
    )
    assert [frame.key for frame in data.frames] == [("abc", "0902")]
    assert data.evaluated == [i - 1 for i in AVA_EVALUATED_IDS]
    scores = np.full((2, 80), 0.01, dtype=np.float32)
    scores[0, 11], scores[1, 11] = 0.7, 0.6  # stand: the right box first
    scores[0, 79], scores[1, 79] = 0.4, 0.5  # watch: 0.36 and 0.40 with the boxes' scores, the wrong one first
    found = DetectedActions(scores, np.array([[640, 320]]), {})
    metrics = compute_detection_metrics(data, found)
    assert metrics["ap50_per_class"] == {11: 1.0, 13: 0.0, 79: 0.5} and metrics["map50"] == pytest.approx(0.5)
    write_results(data, found, ava / "results.csv")
    lines = (ava / "results.csv").read_text().splitlines()
    assert len(lines) == 160 and lines[11] == "abc,0902,0.10000,0.20000,0.50000,0.80000,12,0.63000"
    assert lines[159] == "abc,0902,0.60000,0.20000,0.90000,0.80000,80,0.40000"


def test_an_unreadable_key_frame_counts_with_its_truth(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN[:1] + [{**OWN[0], "video": "d.mp4"}]))
    data = load_detection_data(str(tmp_path / "own.json"))
    assert data.evaluated == [0, 1]
    scores = np.array([[0.9, 0.9], [0.8, 0.1], [0, 0], [0, 0]], dtype=np.float32)
    found = DetectedActions(scores, np.array([[100, 50], [0, 0]]), {1: "d.mp4: cut short"})
    metrics = compute_detection_metrics(data, found)
    assert metrics["ap50_per_class"] == {0: 0.5, 1: 0.5}
    assert KeyFrame("v", "v", "0").key == ("v", "0")


def test_shaken_boxes(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN[:1]))
    plain, shaken, again = (
        load_detection_data(str(tmp_path / "own.json"), box_noise=noise).frames[0].boxes for noise in (0, 0.1, 0.1)
    )
    assert shaken == again != plain
    moved = np.abs(np.array(shaken) - np.array(plain)) / np.array([[29, 38, 29, 38], [10, 38, 10, 38]])
    assert 0.001 < moved.max() <= 0.1


ROWS = json.loads((FIXTURES / "detection_recipes.json").read_text())["rows"]


def test_every_published_run_has_a_recipe():
    assert {name for name in list_recipes() if name.startswith("detection_ava")} == ROWS.keys()


@pytest.mark.parametrize("recipe", ROWS)
def test_recipes_equal_the_published_settings(recipe):
    row, optim = ROWS[recipe], ROWS[recipe]["optim"]
    task, data, augmentation, training = parse_config(
        finetune_detection.SECTIONS, ["--config", recipe, "--bf16", "false"]
    )
    size = row["model"]
    assert task.model_name_or_path == f"umt-vit-{size}-k710" and size in training.output_dir
    assert row["init_from"].startswith(f"{size}_ptk710_ftk710") and task.mode == "full"
    assert (task.num_frames, task.image_size, data.short_side) == (row["frames"], row["train_crop"], row["short_side"])
    assert (data.sampling_strategy, data.frame_stride) == ("dense", row["frame_stride"]) and row["sparse"]
    assert data.frame_span == 300 and task.drop_path_rate == row["drop_path"]
    colors = row["color_jitter_hsv"]
    assert [augmentation.hue_degrees, augmentation.saturation_jitter, augmentation.value_jitter] == list(
        colors.values()
    )
    assert augmentation.box_jitter == row["box_jitter_train"] and augmentation.max_boxes == row["roi"]["max_boxes"]
    assert augmentation.horizontal_flip_probability == row["horizontal_flip"]
    assert data.min_box_score == row["test_boxes"]["score_threshold"]
    assert all([data.train_data, data.validation_data, data.detector_boxes, data.ground_truth, data.excluded])
    assert (training.learning_rate, training.min_learning_rate) == (optim["lr"], optim["min_lr"])
    assert training.warmup_start_learning_rate == optim["warmup_start_lr"]
    assert (training.warmup_epochs, training.weight_decay) == (optim["warmup_epochs"], optim["weight_decay"])
    assert [training.adam_beta1, training.adam_beta2] == optim["betas"] and training.max_grad_norm == 0
    clips = row["batch_per_gpu"] * row["gpus"]
    assert clips == row["batch"]["effective"]
    assert scale_learning_rate(optim["lr"], clips) == row["effective_lr"]["peak"]
    assert scale_learning_rate(optim["min_lr"], clips) == row["effective_lr"]["min"]
    assert training.per_device_train_batch_size == row["batch_per_gpu"]
    assert (training.num_train_epochs, training.layer_decay) == (row["epochs"], row["layer_decay"])
    assert training.seed == row["seed"] and training.scale_learning_rate and not training.load_best_model_at_end


def test_processor_has_the_published_normalisation():
    row = ROWS["detection_ava:b16"]
    processor = UMTVideoProcessor.from_model_config(build_published_config("umt-vit-b16-ava")[0], "detection")
    published = row["normalisation_0_255"]
    assert [255 * value for value in processor.image_mean] == pytest.approx(published["mean"])
    assert [255 * value for value in processor.image_std] == pytest.approx(published["std"])
    assert dict(processor.size)["shortest_edge"] == row["short_side"] and not processor.do_center_crop


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_of_ava_as_other_programs_write_it(ava, separator, encoding):
    expected, _ = load_key_frames(ava / "train.csv")
    header = "video_id,middle_frame_timestamp,x1,y1,x2,y2,action_id,person_id\n"
    text = (header + CSV).replace("\n", ",,\r\n").replace(",", separator)
    (ava / "export.csv").write_bytes(text.encode(encoding))
    assert load_key_frames(ava / "export.csv")[0] == expected
    (ava / "export.csv").write_text("abc,0902,0.1,0.2,0.5,0.8,12,0,7\n")
    with pytest.raises(ValueError, match=r"export\.csv, line 1: expected `movie,second"):
        load_key_frames(ava / "export.csv")


def test_lists_with_byte_order_marks_and_urls(tmp_path):
    rows = [{"video": "https://h/a.mp4", "key_frame": 3, "objects": [{"box": [1, 2, 3, 4], "labels": "été"}]}]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    [frame], names = load_key_frames(tmp_path / "list.json", data_root="/videos")
    assert frame.video == "https://h/a.mp4" and names == ["été"]
    (tmp_path / "excluded.csv").write_text("video_id,timestamp\nabc,0902\n", encoding="utf-8-sig")
    assert read_exclusions(tmp_path / "excluded.csv") == {("abc", "0902")}
    (tmp_path / "excluded.csv").write_text("abc,0902\nabc\n")
    with pytest.raises(ValueError, match=r"excluded\.csv, line 2: expected `movie,second`"):
        read_exclusions(tmp_path / "excluded.csv")
    (tmp_path / "map.pbtxt").write_text("item { id: 1 }", encoding="utf-8-sig")
    assert read_label_map(tmp_path / "map.pbtxt") == [0]
