"""The loopback Hub answers huggingface_hub as the Hub does."""

import subprocess
import sys
from contextlib import suppress

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.server import OTHER_TOKEN, READ_TOKEN, TOKEN, LoopbackHub

CONTENT = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 300, "sub/notes.txt": b"hello\n"}


def write(folder, content=CONTENT):
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["lfs", "regular"])
def test_a_folder_comes_back_as_it_went_up(mode, tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "hub", upload_mode=mode) as hub:
        hub.connect(monkeypatch)
        api = HfApi()
        assert api.whoami()["name"] == "me"
        api.create_repo("model")  # the account's own namespace
        commit = api.upload_folder(repo_id="me/model", folder_path=write(tmp_path / "source"))
        assert api.model_info("me/model").sha == commit.oid
        assert hub.count_requests("PUT /lfs/") == (mode == "lfs")
        target = tmp_path / "target"
        snapshot_download("me/model", local_dir=target)
        assert {path: data for path, data in read(target).items() if path in CONTENT} == CONTENT
        with open(hf_hub_download("me/model", "sub/notes.txt", revision=commit.oid), "rb") as file:
            assert file.read() == CONTENT["sub/notes.txt"]
        before = hub.count_requests("PUT /lfs/")
        assert api.upload_folder(repo_id="me/model", folder_path=tmp_path / "source").oid == commit.oid  # unchanged
        assert hub.count_requests("PUT /lfs/") == before


def test_xet_keeps_its_store_on_this_machine(tmp_path):
    pytest.importorskip("hf_xet", reason="needs hf_xet")
    script = """
import sys
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
api.create_repo("me/model")
api.upload_folder(repo_id="me/model", folder_path=sys.argv[1])
snapshot_download("me/model", local_dir=sys.argv[2])
"""
    with LoopbackHub(tmp_path / "hub", upload_mode="xet") as hub:
        command = [sys.executable, "-c", script, str(write(tmp_path / "source")), str(tmp_path / "target")]
        result = subprocess.run(command, env=hub.environment(), capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert read(tmp_path / "target").items() >= CONTENT.items()
        assert hub.count_requests("PUT /lfs/") == 0 and hub.count_requests("xet-write-token") > 0


def test_branches_tags_and_history(hub, tmp_path):
    api = HfApi()
    hub.add_repo("me/model", CONTENT)
    first = api.model_info("me/model").sha
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="feature/x")
    api.upload_file(repo_id="me/model", path_or_fileobj=b"new", path_in_repo="new.txt", revision="feature/x")
    api.delete_folder("sub", repo_id="me/model", revision="feature/x")
    assert api.list_repo_files("me/model", revision="v1") == list(CONTENT)
    assert api.list_repo_files("me/model", revision="feature/x") == ["config.json", "model.safetensors", "new.txt"]
    refs = api.list_repo_refs("me/model")
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"} and refs.tags[0].target_commit == first
    assert len(api.list_repo_commits("me/model", revision="feature/x")) == 4
    assert [info.path for info in api.get_paths_info("me/model", ["sub", "config.json"])] == ["config.json", "sub"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("me/model", branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "missing.txt")
    api.delete_branch("me/model", branch="feature/x")
    api.delete_repo("me/model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/model")


def test_private_repos_and_tokens(hub, tmp_path):
    hub.add_repo("me/secret", CONTENT, private=True)
    assert HfApi(token=TOKEN).model_info("me/secret").private
    assert HfApi(token=READ_TOKEN).model_info("me/secret").private
    for token in (False, OTHER_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("me/secret")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("me/secret", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    for token in (READ_TOKEN, OTHER_TOKEN):
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).create_repo("me/other")


def test_spaces_and_datasets(hub, tmp_path):
    api = HfApi()
    api.create_repo("me/space", repo_type="space", space_sdk="gradio")
    api.upload_folder(repo_id="me/space", repo_type="space", folder_path=write(tmp_path / "source"))
    assert api.space_info("me/space").sdk == "gradio"
    hub.add_repo("me/data", CONTENT, repo_type="dataset")
    path = hf_hub_download("me/data", "model.safetensors", repo_type="dataset")
    with open(path, "rb") as file:
        assert file.read() == CONTENT["model.safetensors"]


def test_a_file_is_served_from_where_it_lies_and_in_ranges(hub, tmp_path):
    large = tmp_path / "large.pth"
    large.write_bytes(b"\0" * 200_000)
    hub.add_repo("me/model", {"large.pth": large})
    url = huggingface_hub.hf_hub_url("me/model", "large.pth")
    part = huggingface_hub.get_session().get(url, headers={"Range": "bytes=199990-"})
    assert part.status_code == 206 and part.content == b"\0" * 10
    assert huggingface_hub.get_hf_file_metadata(url).size == 200_000


def test_faults(hub, tmp_path):
    api = HfApi()
    source = write(tmp_path / "source")
    api.create_repo("me/model")
    hub.fail("POST .*/preupload/", status=503, times=2)
    hub.cut("PUT /lfs/", after_bytes=1000)
    with suppress(RuntimeError):  # an older huggingface_hub leaves it to its caller to try again
        api.upload_folder(repo_id="me/model", folder_path=source)
    api.upload_folder(repo_id="me/model", folder_path=source)
    assert hub.list_files("me/model") == [".gitattributes", *CONTENT]
    uploads = [request for request in hub.requests if request.method == "PUT"]
    assert [(request.status, request.num_bytes_received) for request in uploads] == [(0, 1000), (200, 76800)]
    hub.down()
    with pytest.raises(Exception, match="disconnected|reset|closed"):
        api.model_info("me/model")
    hub.heal()
    assert api.model_info("me/model").id == "me/model"


def test_a_process_of_its_own(hub, tmp_path):
    script = "import huggingface_hub as h; assert not h.get_token(); h.model_info('me/model')"
    hub.add_repo("me/model")
    environment = hub.environment(token=None, home=tmp_path / "home")
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert hub.requests[-1].authorization is None
