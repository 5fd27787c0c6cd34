"""The report of an evaluation: what identifies its data."""

import builtins
import hashlib
import os

from datasets import Dataset
from PIL import Image

from umt_hf.evaluation import report
from umt_hf.evaluation.report import fingerprint_data
from umt_hf.runs import folder as run_folder


def test_annotations_are_identified_by_their_bytes(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4,1\n")
    assert fingerprint_data(str(tmp_path / "list.csv")) == hashlib.sha256(b"a.mp4,1\n").hexdigest()
    assert fingerprint_data("some/name") is None


def test_folders_are_identified_without_reading_a_video(tmp_path, monkeypatch):
    for name in ("run/a.mp4", "jump/b.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"12")
    os.utime(tmp_path / "run" / "a.mp4", ns=(0, 10**18))

    def refuse(*arguments, **options):
        raise AssertionError(f"{arguments} was read")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        patch.setattr(run_folder, "_update", refuse)
        first = fingerprint_data(str(tmp_path))
        assert first == fingerprint_data(str(tmp_path))
    assert first is not None and report.hash_source is run_folder.hash_source
    (tmp_path / "jump" / "._b.mp4").touch()  # what is not tested does not count
    assert fingerprint_data(str(tmp_path)) == first
    os.utime(tmp_path / "run" / "a.mp4", ns=(0, 2 * 10**18))
    second = fingerprint_data(str(tmp_path))
    (tmp_path / "run" / "a.mp4").write_bytes(b"123")
    os.utime(tmp_path / "run" / "a.mp4", ns=(0, 2 * 10**18))
    third = fingerprint_data(str(tmp_path))
    (tmp_path / "run" / "a.mp4").rename(tmp_path / "run" / "c.mp4")
    assert len({first, second, third, fingerprint_data(str(tmp_path))}) == 4


def test_saved_datasets_and_frames_have_one_too(tmp_path):
    Dataset.from_dict({"video": ["a.mp4"], "label": [1]}).save_to_disk(tmp_path / "saved")
    first = fingerprint_data(str(tmp_path / "saved"))
    Dataset.from_dict({"video": ["a.mp4"], "label": [0]}).save_to_disk(tmp_path / "saved2")
    assert first is not None and fingerprint_data(str(tmp_path / "saved2")) != first
    (tmp_path / "frames" / "clip").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "clip" / f"{number}.png")
    first = fingerprint_data(str(tmp_path / "frames"))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "frames" / "clip" / "1.png")
    assert fingerprint_data(str(tmp_path / "frames")) != first
