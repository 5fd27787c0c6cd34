"""What belongs to what in retrieval, questions and options: the published table, and where we differ on purpose."""

import json
import sqlite3
from collections import defaultdict
from pathlib import Path

import pytest
from datasets import Dataset

from umt_hf.data.annotations import (
    compute_pair_id,
    identify_video,
    load_answers,
    load_choices,
    load_pairs,
    load_questions,
    load_retrieval_set,
    merge_answers,
    name_video,
)
from umt_hf.processing.processing_umt_video_text import clean_caption

pytestmark = pytest.mark.usefixtures("list_store")

CASES = json.loads((Path(__file__).parents[2] / "fixtures/multi_modality/annotations.json").read_text())["rows"]


def write(folder: Path, rows: list[dict]) -> str:
    (folder / "list.json").write_text(json.dumps(rows))
    return str(folder / "list.json")


def choose_captions(options: dict, default: str) -> str:
    if options.get("is_paragraph_retrieval"):
        return "paragraph"
    return "each" if options.get("multi_txt_gt") else default


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == "eval"], ids=lambda case: case["tag"])
def test_retrieval_sets_equal_the_published_ones(tmp_path, case):
    options = case["options"]
    found = load_retrieval_set(
        write(tmp_path, case["annotations"]),
        captions=choose_captions(options, "each"),
        multiple_videos_per_text=options.get("has_multi_vision_gt", False),
        data_root="ROOT",
    )
    assert [clean_caption(text) for text in found.texts] == case["text"]
    assert found.videos == case["image"]
    as_lists = [[x] if isinstance(x, int) else x for x in case["txt2img"].values()]
    assert found.videos_of_text == as_lists
    assert found.texts_of_video == [[x] if isinstance(x, int) else x for x in case["img2txt"].values()]


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] == "train"], ids=lambda case: case["tag"])
def test_training_pairs_equal_the_published_ones(tmp_path, case):
    """Ids agree but for one slip of the published code: files of one name in two folders shared an id."""
    options = case["options"]
    table = load_pairs(
        write(tmp_path, case["annotations"]), captions=choose_captions(options, "single"), data_root="ROOT"
    )
    assert [(row["video"], clean_caption(row["caption"])) for row in table] == [
        (item["image"], item["caption"]) for item in case["items"]
    ]
    by_caption = options.get("has_multi_vision_gt", False)
    ours = [compute_pair_id(0, row["caption"] if by_caption else row["video"]) for row in table]
    theirs = [(item["idx"], None if by_caption else item["image"]) for item in case["items"]]
    assert group(ours) == group(theirs)


def group(ids: list) -> set[tuple[int, ...]]:
    groups = defaultdict(list)
    for position, value in enumerate(ids):
        groups[value].append(position)
    return {tuple(members) for members in groups.values()}


def test_pair_ids_are_unique_across_corpora():
    assert compute_pair_id(0, "a.mp4") != compute_pair_id(1, "a.mp4")
    assert compute_pair_id(3, "a.mp4") == compute_pair_id(3, "a.mp4") < 2**63


def test_list_of_captions_needs_a_meaning(tmp_path):
    source = write(tmp_path, [{"video": "a.mp4", "caption": ["one", "two"]}, {"video": "b.mp4", "caption": "three"}])
    with pytest.raises(ValueError, match="captions=each"):
        load_pairs(source)
    assert load_pairs(source, "each")["caption"][:] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="no caption"):
        load_pairs(write(tmp_path, [{"video": "a.mp4"}]))


def test_images_sqlite_and_saved_datasets(tmp_path):
    source = write(tmp_path, [{"image": "a.jpg", "caption": "one"}])
    assert load_pairs(source, video_column="image")[0] == {"video": str(tmp_path / "a.jpg"), "caption": "one"}
    with sqlite3.connect(tmp_path / "corpus.sqlite") as base:
        base.execute("CREATE TABLE annos (id INTEGER, video TEXT, caption TEXT)")
        base.executemany("INSERT INTO annos VALUES (?, ?, ?)", [(1, "b.mp4", "two"), (0, "a.mp4", "one")])
    base.close()
    table = load_pairs(str(tmp_path / "corpus.sqlite"), data_root="/videos")
    assert table[:] == {"video": ["/videos/a.mp4", "/videos/b.mp4"], "caption": ["one", "two"]}
    (tmp_path / "broken.db").write_text("nothing")
    with pytest.raises(ValueError, match=r"broken\.db.*annos"):
        load_pairs(str(tmp_path / "broken.db"))
    Dataset.from_dict({"clip": ["a.mp4"], "caption": [["x", "y"]]}).save_to_disk(str(tmp_path / "saved"))
    assert load_pairs(str(tmp_path / "saved"), "paragraph", video_column="clip")["caption"][:] == ["x y"]


def test_questions_merge_the_annotators_answers(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "what?", "answer": ["cat", "dog", "cat", "cat"], "question_id": 7},
        {"video": "b.mp4", "question": "who?", "answer": "man", "question_id": 9},
    ]
    table = load_questions(write(tmp_path, rows))
    assert table[0]["answers"] == ["cat", "dog"] and table[0]["answer_weights"] == [0.75, 0.25]
    assert table[1]["answers"] == ["man"] and table["question_id"][:] == [7, 9]
    assert load_questions(write(tmp_path, [{"video": "a.mp4", "question": "what?"}]))[0]["answers"] == []
    assert merge_answers(["b", "a", "b"]) == (["b", "a"], [2 / 3, 1 / 3])


def test_choices_are_checked(tmp_path):
    rows = [{"video": "a.mp4", "caption": ["x", "y"], "answer": 1}]
    assert load_choices(write(tmp_path, rows))[0]["answer"] == 1
    with pytest.raises(ValueError, match="object 0: answer 2"):
        load_choices(write(tmp_path, [{**rows[0], "answer": 2}]))


def test_bytes_identify_a_video():
    first, second = {"path": None, "bytes": b"one"}, {"path": None, "bytes": b"two"}
    assert identify_video(first, 0) == identify_video(dict(first), 7) == identify_video(b"one", 3)
    assert identify_video(first, 0) != identify_video(second, 0)
    # Rows with bytes often keep a file name, which videos of two folders share.
    assert identify_video({**first, "path": "1.mp4"}, 0) != identify_video({**second, "path": "1.mp4"}, 0)
    assert identify_video({**first, "path": "1.mp4"}, 0) == identify_video({**first, "path": "2.mp4"}, 0)
    assert identify_video("a.mp4", 0) == identify_video({"path": "a.mp4", "bytes": None}, 3) == "a.mp4"
    assert identify_video(None, 3) == identify_video({"path": None, "bytes": b""}, 3) == "row 3"
    assert name_video({**first, "path": "1.mp4"}, 0) == "1.mp4"
    assert name_video(first, 0) == identify_video(first, 0) and name_video(first, 0).startswith("bytes ")


def test_captions_of_one_video_in_bytes_are_texts_of_one_video(tmp_path):
    rows = [
        {"video": {"path": None, "bytes": content}, "caption": f"text {i}"}
        for i, content in enumerate([b"a", b"b", b"a"])
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    found = load_retrieval_set(str(tmp_path / "saved"))
    assert found.texts_of_video == [[0, 2], [1]] and found.videos_of_text == [[0], [1], [0]]


def test_tables_with_a_header_and_byte_order_marks(tmp_path):
    (tmp_path / "list.csv").write_text("video;caption\na.mp4;a cat\nhttps://h/b.mp4;a dog\n", encoding="utf-8-sig")
    pairs = load_pairs(str(tmp_path / "list.csv"))
    assert pairs["caption"][:] == ["a cat", "a dog"] and pairs["video"][:][1] == "https://h/b.mp4"
    (tmp_path / "list.csv").write_text("question,video,answer,label\nwhat?,a.mp4,cat,x\n")
    assert load_questions(str(tmp_path / "list.csv"))["answers"][:] == [["cat"]]
    (tmp_path / "answers.json").write_text('["ja", "né"]', encoding="utf-8-sig")
    assert load_answers(str(tmp_path / "answers.json")) == ["ja", "né"]
    (tmp_path / "list.json").write_text(json.dumps([{"video": "a.mp4", "caption": "x"}]), encoding="utf-8-sig")
    assert load_pairs(str(tmp_path / "list.json"))["caption"][:] == ["x"]


def test_an_answer_may_be_written_as_text(tmp_path):
    rows = [{"video": "a.mp4", "caption": ["x", "y"], "answer": "1"}]
    assert load_choices(write(tmp_path, rows))["answer"][:] == [1]
    for answer in ("2", "y", -1, None):
        with pytest.raises(ValueError, match="object 0: answer .* is not an index"):
            load_choices(write(tmp_path, [{**rows[0], "answer": answer}]))
