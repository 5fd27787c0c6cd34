"""Videos and lists in object stores, through the commands: in memory, and in a local server that speaks S3."""

import json
import uuid
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from tests.e2e.runs import FINE_TUNING, to_flags
from tests.processes import find_free_port
from tests.unit.inference.test_search import QUERY, save_model
from tests.unit.video_files import write_video
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor, VideoClassifier
from umt_hf.cli import app
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.processing.decoding import VideoDecodingError, open_video

runner = CliRunner()
NAMES = {0: "jump", 1: "run"}


@pytest.fixture(scope="module")
def store():
    """Address of an empty folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Folders of two classes, for training and held out."""
    folder = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 3), ("validation", 2)):
        for label in ("jump", "run"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                write_video(folder / split / label / f"{number}.mp4", num_frames=6 + number, rate=12 + len(label))
    return folder


@pytest.fixture(scope="module")
def classifier(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    model = UMTVideoForVideoClassification.from_pretrained(student, id2label=NAMES, label2id={"jump": 0, "run": 1})
    model.save_pretrained(folder)
    UMTVideoProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


def upload(folder: Path, address: str) -> list[str]:
    """Copy the videos of a folder, and say where they are then."""
    store = fsspec.filesystem(address.split("://")[0])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    for name in names:
        store.pipe_file(f"{address}/{name}", (folder / name).read_bytes())
    return [f"{address}/{name}" for name in names]


def test_classify_answers_the_same_of_a_store(store, clips, classifier):
    folder = clips / "validation"
    addresses = upload(folder, f"{store}/validation")
    words = ["--model", str(classifier), "--num-workers", "0", "--json"]
    reports = []
    for source in (f"{store}/validation", str(folder)):
        result = runner.invoke(app, ["classify", source, f"{store}/missing.mp4", *words])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
    remote, local = reports
    assert [video["path"] for video in remote["videos"]] == addresses
    assert [video["labels"] for video in remote["videos"]] == [video["labels"] for video in local["videos"]]
    reason = "no such file. Check the address."
    assert remote["skipped"] == [{"path": f"{store}/missing.mp4", "reason": reason}]
    for answer, video in zip(VideoClassifier(classifier).classify(addresses), remote["videos"], strict=True):
        assert [(scored.label, pytest.approx(scored.probability)) for scored in answer] == [
            (scored["label"], scored["probability"]) for scored in video["labels"]
        ]

    result = runner.invoke(app, ["classify", "ftp://host/a.mp4", *words])
    assert result.exit_code == 2 and "the protocol ftp is not read" in result.stderr


def test_fine_tuning_and_evaluation_read_lists_in_a_store(store, clips, student, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    for split in ("train", "validation"):
        addresses = upload(clips / split, f"{store}/{split}")
        lines = [f"{address.removeprefix(store + '/')},{address.split('/')[-2]}\n" for address in addresses]
        memory.pipe_file(f"{store}/{split}.csv", "".join(lines).encode())
    fields = FINE_TUNING | {
        "model_name_or_path": student,
        "train_data": f"{store}/train.csv",
        "validation_data": f"{store}/validation",
        "output_dir": tmp_path / "model",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "dataloader_num_workers": 0,
    }
    metrics = finetune_classification.main(to_flags(**fields))
    assert metrics["eval_unreadable_videos"] == 0
    tested = evaluate_classification.main(
        to_flags(
            model_name_or_path=tmp_path / "model",
            data=f"{store}/validation.csv",
            output_dir=tmp_path / "report",
            dataloader_num_workers=0,
        )
    )
    assert tested["top1_accuracy"] == pytest.approx(metrics["eval_top1_accuracy"])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["data"] == f"{store}/validation.csv" and report["data_sha256"]


def test_videos_of_a_store_are_searched(store, shapes, tmp_path):
    pytest.importorskip("lancedb")
    addresses = upload(Path(shapes, "videos", "validation"), f"{store}/shapes")
    model, index = save_model(tmp_path / "model"), str(tmp_path / "index")
    for expected in (len(addresses), 0):
        words = ["embed", f"{store}/shapes", "--model", str(model), "--out", index, "--num-workers", "0", "--json"]
        result = runner.invoke(app, words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["num_encoded"] == expected
    result = runner.invoke(app, ["search", index, QUERY, "--json", "--rerank"])
    hits = json.loads(result.stdout)
    assert sorted(hit["path"] for hit in hits) == addresses
    assert all(hit["matching_score"] is not None for hit in hits)


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server on this machine, and the settings of fsspec that lead there."""
    reason = "`make test-extras` installs moto and s3fs, whose botocore lowers python-dateutil for everything else"
    moto = pytest.importorskip("moto.server", reason=reason)
    pytest.importorskip("s3fs", reason=reason)
    port = find_free_port()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    settings = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "x", "secret": "x"}
    former = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = settings
    fsspec.filesystem("s3").mkdir("videos")
    yield "s3://videos"
    fsspec.config.conf.pop("s3")
    if former is not None:
        fsspec.config.conf["s3"] = former
    server.stop()


def test_a_bucket_is_read_like_a_folder(bucket, clips, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    addresses = upload(clips / "validation", f"{bucket}/validation")
    for workers in ("0", "2"):
        words = ["classify", f"{bucket}/validation", "--model", str(classifier), "--num-workers", workers, "--json"]
        result = runner.invoke(app, words)
        assert result.exit_code == 0, result.output
        assert [video["path"] for video in json.loads(result.stdout)["videos"]] == addresses
    lines = [f"{address.removeprefix(bucket + '/')},{address.split('/')[-2]}\n" for address in addresses]
    fsspec.filesystem("s3").pipe_file(f"{bucket}/list.csv", "".join(lines).encode())
    metrics = evaluate_classification.main(
        to_flags(
            model_name_or_path=classifier,
            data=f"{bucket}/list.csv",
            output_dir=tmp_path / "report",
            dataloader_num_workers=2,
        )
    )
    assert metrics["unreadable_videos"] == 0
    for name, words in (("none.mp4", "no such file"), ("validation", "is a folder")):
        with pytest.raises(VideoDecodingError, match=words):
            open_video(f"{bucket}/{name}")
