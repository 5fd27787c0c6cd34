"""A missing repository and a missing network are told apart within seconds, and what is in the cache keeps working."""

import socket
import time

import pytest
from accelerate import Accelerator
from huggingface_hub import constants
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.hub.released import write_bert_tokenizer
from tests.hub.server import LoopbackHub
from umt_hf import UMTVideoForVideoClassification, VideoClassifier
from umt_hf.hub_cards.model_info import describe_model
from umt_hf.hub_cards.released_checkpoints import convert_released_checkpoint
from umt_hf.inference.features import load_encoder
from umt_hf.inference.loading import load_complete_model, load_video_processor
from umt_hf.inference.search import VideoTextEncoder
from umt_hf.inference.starts import require_other_model, require_tokenizer
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs import hub_access
from umt_hf.training.alignment import load_teacher
from umt_hf.training.arguments import TeacherArguments

# The bound is 5 s for each of two tries; machines under test are busy.
SECONDS = 25
NAME = "owner/model"
UNREACHABLE = "owner/model is not a folder here, and cannot be read from the Hub: http://.* cannot be reached "
ASKING = {
    "classifier": VideoClassifier,
    "encoder": load_encoder,
    "searcher": VideoTextEncoder,
    "processor": load_video_processor,
    "info": describe_model,
    "tokenizer": require_tokenizer,
    "teacher": lambda name: require_other_model(name, ("clip",), "a CLIP"),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "hub") as hub:
        # As users have it: with the pauses of the client's own tries.
        hub.connect(monkeypatch, fast_retries=False)
        monkeypatch.setattr(hub_access, "_answers", {})
        monkeypatch.chdir(tmp_path)
        yield hub


def turn_to(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    hub_access._answers.clear()


@pytest.fixture
def closed(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    turn_to(monkeypatch, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("kind", ASKING)
def test_a_repository_that_is_not_there(kind, hub):
    start = time.monotonic()
    with pytest.raises(OSError) as error:
        ASKING[kind](NAME)
    assert str(error.value) == (
        f"owner/model is not a folder here, and cannot be read from the Hub: {hub.url} has no such repository, or it "
        "is private. Check the name, or run `hf auth login`."
    )
    assert hub.count_requests("HEAD") == len(hub.requests) == 1 and time.monotonic() - start < SECONDS


@pytest.mark.parametrize("kind", ASKING)
def test_a_port_where_nobody_listens(kind, closed):
    start = time.monotonic()
    with pytest.raises(OSError, match=UNREACHABLE + r"\(.*\)\. Check the network and HF_ENDPOINT, or give a local"):
        ASKING[kind](NAME)
    assert time.monotonic() - start < SECONDS


def test_a_port_that_accepts_and_never_answers(hub, monkeypatch):
    monkeypatch.setattr(hub_access, "SECONDS_TO_ANSWER", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        turn_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(OSError, match=UNREACHABLE + r"\(no answer in time\)"):
            VideoClassifier(NAME)
        assert 1.9 < time.monotonic() - start < 10
        with pytest.raises(OSError, match="cannot be reached"):
            convert_released_checkpoint("umt-vit-b16")
        assert time.monotonic() - start < 20


def test_one_failure_is_tried_again_and_two_are_an_unreachable_hub(hub, folders):
    hub.add_repo(NAME, {path.name: path for path in folders["classifier"].iterdir()})
    hub.cut("HEAD", times=1)
    assert VideoClassifier(NAME).labels
    hub_access._answers.clear()
    hub.fail("HEAD", status=404)
    with pytest.raises(OSError, match="owner/other .* has no such repository"):
        describe_model("owner/other")
    hub.fail("HEAD", status=503, times=2)
    with pytest.raises(OSError, match=r"owner/other .* cannot be reached \(it answers with status 503\)"):
        describe_model("owner/other")


def test_a_released_file_without_a_network(closed):
    start = time.monotonic()
    with pytest.raises(OSError, match=r"cannot be reached(.|\n)*umt-hf convert b16_ptk710_f8_res224.pth umt-vit-b16"):
        convert_released_checkpoint("umt-vit-b16")
    with pytest.raises(OSError, match=r"cannot be reached(.|\n)*--tokenizer FOLDER"):
        convert_released_checkpoint("umt-vit-b16-25m")
    assert time.monotonic() - start < SECONDS


def test_private_and_gated_repositories_and_revisions(hub, folders, monkeypatch):
    hub.add_repo("me/private", {path.name: path for path in folders["classifier"].iterdir()}, private=True)
    assert VideoClassifier("me/private").labels  # with the token of the login
    with pytest.raises(OSError, match="has no revision 'v9'"):
        load_complete_model(UMTVideoForVideoClassification, "me/private", revision="v9")
    hub.connect(monkeypatch, token=None, home=hub.root / "nobody")
    hub_access._answers.clear()
    with pytest.raises(OSError, match="or it is private. Check the name, or run `hf auth login`"):
        VideoClassifier("me/private")
    with pytest.raises(OSError, match="neither a folder here nor a name of the Hub"):
        VideoClassifier("two words/model")


def test_what_is_in_the_cache_is_used_without_a_network(hub, folders, monkeypatch, caplog):
    for kind, repo in (("classifier", NAME), ("retrieval", "owner/search")):
        hub.add_repo(repo, {path.name: path for path in folders[kind].iterdir()})
    before = VideoClassifier(NAME), VideoTextEncoder("owner/search")
    assert describe_model(NAME).labels
    hub.down()
    hub_access._answers.clear()
    start, requests = time.monotonic(), len(hub.requests)
    assert VideoClassifier(NAME).labels == before[0].labels
    assert describe_model(NAME).labels
    searcher = VideoTextEncoder("owner/search")
    assert searcher.name == "owner/search" and searcher.describe() == before[1].describe()
    assert time.monotonic() - start < SECONDS
    assert len(hub.requests) - requests == 4  # two tries for each repository
    assert "owner/model comes from the cache" in caplog.text

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_access._answers.clear()
    requests = len(hub.requests)
    assert VideoClassifier(NAME).labels == before[0].labels
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE.*not there"):
        VideoClassifier("owner/other")
    assert len(hub.requests) == requests


def test_teachers_and_text_models_in_the_cache(hub, tmp_path):
    """As the scripts load them."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "files")
    hub.add_repo("openai/clip", {path.name: path for path in (tmp_path / "files").iterdir()})
    hub.add_repo("google-bert/bert", write_bert_tokenizer(tmp_path / "words", 120))
    chosen = TeacherArguments(teacher_name_or_path="openai/clip", num_aligned_layers=1)

    def load() -> tuple[int, int]:
        teacher = load_teacher(chosen, "sdpa", Accelerator(mixed_precision="no"))
        return teacher.patch_size, len(build_tokenizer(require_tokenizer("google-bert/bert"), max_length=8))

    assert load() == (16, 120)
    hub.down()
    hub_access._answers.clear()
    start, requests = time.monotonic(), len(hub.requests)
    assert load() == (16, 120)
    assert time.monotonic() - start < SECONDS and len(hub.requests) - requests == 4
    assert require_other_model("openai/clip", ("clip_vision_model",), "a CLIP") != "openai/clip"  # the cache's folder
