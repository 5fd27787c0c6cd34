"""What a run says of its data, and the share that it holds out."""

import pytest
from datasets import Dataset

from umt_hf.finetuning.found_videos import describe_found, hold_out, list_doubts


def build(labels, start=0) -> Dataset:
    return Dataset.from_dict({"video": [f"{start + row}.mp4" for row in range(len(labels))], "label": labels})


def test_what_was_found_is_one_line():
    train, validation = build([0, 0, 1]), build([1], 10)
    assert describe_found(train, validation, None, ["run", "jump"]) == (
        "3 training, 1 validation videos of 2 classes: run (2), jump (1)."
    )
    assert "1 validation and 2 test videos" in describe_found(train, validation, build([0, 1], 20), ["run", "jump"])
    names = [f"class {index}" for index in range(12)]
    many = describe_found(build(list(range(12))), validation, None, names)
    assert many.endswith("class 9 (1) and 2 more.") and "12 classes" in many
    several = build([[0, 1], [1]])
    assert "run (1), jump (2)" in describe_found(several, validation, None, ["run", "jump"])


def test_what_looks_wrong_is_said():
    train = build([0, 1] * 5)
    assert list_doubts(train, {"validation": build([0, 1], 100)}, ["run", "jump"]) == []
    (doubt,) = list_doubts(train, {"validation": build([0, 1], 9)}, ["run", "jump"])
    assert doubt.startswith("1 of 2 validation videos are training videos") and doubt.endswith(": 9.mp4.")
    (doubt,) = list_doubts(build([0] * 19 + [1]), {}, ["run", "jump"])
    assert doubt.startswith("'run' has 19 of 20 training videos")


def test_links_to_one_file_are_one_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    one, other = (Dataset.from_dict({"video": [str(tmp_path / name)], "label": [0]}) for name in ("a.mp4", "b.mp4"))
    assert len(list_doubts(one, {"test": other}, ["run"])) == 1


def test_a_share_of_each_class_is_held_out():
    labels = [0] * 20 + [1] * 10 + [2] * 2 + [3]
    train, held_out = hold_out(build(labels), 0.1, seed=0)
    assert sorted(held_out["label"]) == [0, 0, 1, 2]  # a class of one video keeps it
    assert sorted([*train["video"], *held_out["video"]]) == sorted(build(labels)["video"])
    assert hold_out(build(labels), 0.1, seed=0)[1]["video"] == held_out["video"]
    assert hold_out(build(labels), 0.1, seed=1)[1]["video"] != held_out["video"]
    with pytest.raises(ValueError, match="no class has two videos"):
        hold_out(build([0, 1]), 0.5, seed=0)
    _, several = hold_out(build([[0, 1], [0], [1]]), 0.5, seed=0)
    assert len(several) == 1
