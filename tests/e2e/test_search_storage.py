"""An index in object storage: that of a local server which speaks S3."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.processes import build_environment, find_free_port, read_output, start_process, wait_for
from tests.unit.inference.test_search import QUERY, save_model
from tests.unit.inference.test_video_index import ENCODER, build_rows
from umt_hf.cli import app
from umt_hf.inference.video_index import VideoIndex

moto = pytest.importorskip(
    "moto.server", reason="`make test-extras` installs moto, whose boto3 lowers python-dateutil for everything else"
)
pytest.importorskip("lancedb")

BUCKET = "videos"


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """How the server is reached, as LanceDB reads it from the environment."""
    port = find_free_port()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    import boto3

    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket=BUCKET)
    yield {
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    server.stop()


def add_rows(address: str, options: dict[str, str], prefix: str, count: int) -> None:
    index = VideoIndex(address, options, max_fragments=6)
    for i in range(count):
        index.add(build_rows(f"{prefix}{i:02d}", vector=(i, 1)))
    index.finish([])


def test_four_writers_at_once(variables, tmp_path):
    options = {name.lower(): value for name, value in variables.items()}
    address = f"s3://{BUCKET}/four"
    index = VideoIndex(address, options)
    index.check_encoder(ENCODER)
    with pytest.raises(FileNotFoundError, match="is not an index"):
        index.load()
    index.create(ENCODER)
    processes = [
        start_process(
            add_rows, address, options, prefix, 8, environment=build_environment(0, 1, 0), output=tmp_path / prefix
        )
        for prefix in "abcd"
    ]
    wait_for(processes, 0, 200)
    assert [process.exitcode for process in processes] == [0] * 4, [read_output(tmp_path / p) for p in "abcd"]
    names = [f"{prefix}{i:02d}" for prefix in "abcd" for i in range(8)]
    assert VideoIndex(address, options).list_paths() == names
    found = VideoIndex(address, options).load().find_nearest(np.array([1, 0], np.float32), 4)
    assert sorted(row["path"] for row in found) == ["a07", "b07", "c07", "d07"]
    with pytest.raises(ValueError, match="built by another model"):
        VideoIndex(address, options).check_encoder(ENCODER | {"weights": "1"})


def test_the_commands_read_and_write_there(variables, shapes, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = save_model(tmp_path / "model")
    videos = [str(path) for path in sorted(Path(shapes, "videos", "train").iterdir())[:3]]
    address = f"s3://{BUCKET}/commands"
    for expected in (3, 0):
        words = ["embed", *videos, "--model", str(model), "--out", address, "--num-workers", "0", "--json"]
        words += ["--store", "keys"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1])["num_encoded"] == expected
    result = CliRunner().invoke(app, ["search", address, QUERY, "--json"])
    assert sorted(hit["path"] for hit in json.loads(result.stdout)) == videos
    result = CliRunner().invoke(app, ["search", address, QUERY, "--json", "--rerank"])
    assert result.exit_code == 0 and "encodes" not in result.stderr
    assert sorted(hit["path"] for hit in json.loads(result.stdout) if hit["matching_score"] is not None) == videos
