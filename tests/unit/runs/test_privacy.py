"""Paths lose their folders, and nothing else changes."""

import pytest

from umt_hf.runs.privacy import hide_folders


@pytest.mark.parametrize(
    "key,text,expected",
    [
        ("train_data", "/home/ann/secret/train.csv", "train.csv"),
        ("train_data", "../secret/videos/train", "train"),
        ("train_data", "secret/train", "train"),
        ("train_data", "secret/clips/cats", "cats"),
        ("train_data", "C:\\Users\\ann\\train.csv", "train.csv"),
        ("train_data", "secret\\train.csv", "train.csv"),
        ("video", "secret/a b.mp4", "a b.mp4"),
        ("video", "file:///home/ann/a.mp4", "a.mp4"),
        ("video", "~/a.mp4", "a.mp4"),
        ("teacher_name_or_path", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("teacher_name_or_path", "umt-vit-b16", "umt-vit-b16"),
        ("video", "https://example.org/videos/a.mp4", "https://example.org/videos/a.mp4"),
        ("answer", "and/or", "and/or"),
        ("0", "riding or walking a horse/mule", "riding or walking a horse/mule"),
        ("hidden_act", "gelu", "gelu"),
        ("mask_ratio", 0.8, 0.8),
        ("train_data", None, None),
    ],
)
def test_a_path_keeps_its_last_part_alone(key, text, expected):
    assert hide_folders({key: text}) == {key: expected}
    assert hide_folders({"section": {key: [text]}}) == {"section": {key: [expected]}}


def test_a_folder_that_looks_like_a_name_on_the_hub(tmp_path, monkeypatch):
    assert hide_folders({"model_name_or_path": "secret/mine"}) == {"model_name_or_path": "secret/mine"}
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    assert hide_folders({"model_name_or_path": "secret/mine"}, [tmp_path]) == {"model_name_or_path": "mine"}
    monkeypatch.chdir(tmp_path)
    assert hide_folders({"model_name_or_path": "secret/mine"}) == {"model_name_or_path": "mine"}
