"""The index folder and the search through it, with an untrained model of a few hundred numbers."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from tests.unit.modeling.test_modeling_video_text import TINY, TINY_TEXT
from umt_hf import (
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
    UMTVideoTextProcessor,
)
from umt_hf.data.video_files import SkippedVideo, list_videos
from umt_hf.inference import video_index
from umt_hf.inference.loading import compute_fingerprint
from umt_hf.inference.search import VideoSearcher, VideoTextEncoder, embed_videos, format_hits
from umt_hf.modeling.losses_umt import compute_similarity
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.processing_umt_video_text import build_tokenizer

lancedb = pytest.importorskip("lancedb")

WORDS = ["a", "red", "circle", "green", "square", "moving", "left", "right", "up", "and"]
SPECIAL = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUERY = "a red circle moving left"


def save_model(folder: Path, kind=UMTVideoTextForRetrieval, seed: int = 0, words: Sequence[str] = WORDS) -> Path:
    """Write an untrained model whose matching head and projections tell videos apart, and its processor."""
    torch.manual_seed(seed)
    text = TINY_TEXT | {"vocab_size": len(SPECIAL) + len(words)}
    model = kind(UMTVideoTextConfig(**TINY | {"text_config": text}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    video_processor = UMTVideoProcessor(
        num_frames=2, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    UMTVideoTextProcessor(video_processor, build_tokenizer([*SPECIAL, *words], max_length=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=5, num_validation_clips=1, num_test_clips=1)
    return folder / "videos" / "train"


@pytest.fixture(scope="module")
def index(model, videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "index"
    report = embed_videos([str(videos)], model, folder, batch_size=2, shard_size=2)
    assert (report.num_encoded, report.num_unchanged, report.num_in_index, report.skipped) == (5, 0, 5, ())
    return folder


def test_scores_are_those_of_the_dual_encoder(model, videos, index):
    reference, processor = UMTVideoTextForRetrieval.from_pretrained(model), AutoProcessor.from_pretrained(model)
    paths = sorted(str(path) for path in videos.iterdir())
    inputs = processor(text=[QUERY], videos=paths, padding=True, return_tensors="pt")
    with torch.no_grad():
        video = reference.get_video_features(inputs.pixel_values)
        text = reference.get_text_features(inputs.input_ids)
        expected = compute_similarity(video.pooler_output, text.pooler_output)[:, 0]
        logits = reference.match(video.last_hidden_state, text.last_hidden_state.expand(5, -1, -1))[:, 1]
    assert expected.std() > 1e-3 and logits.std() > 1e-3
    assert expected.argsort(descending=True).tolist() != logits.argsort(descending=True).tolist()

    hits = VideoSearcher(index).search(QUERY)
    assert [hit.path for hit in hits] == [paths[i] for i in expected.argsort(descending=True)]
    found = {hit.path: hit.similarity for hit in hits}
    np.testing.assert_allclose([found[path] for path in paths], expected, atol=1e-6)
    assert all(hit.matching_score is None and hit.duration_seconds > 0 for hit in hits)
    assert [hit.path for hit in VideoSearcher(index).search(QUERY, top_k=2)] == [hit.path for hit in hits[:2]]

    reranked = VideoSearcher(index).search(QUERY, top_k=2, rerank=True)
    assert [hit.path for hit in reranked] == [paths[i] for i in logits.argsort(descending=True)[:2]]
    np.testing.assert_allclose(
        [hit.matching_score for hit in reranked], logits.sort(descending=True)[0][:2], atol=1e-5
    )
    assert reranked[0].similarity == found[reranked[0].path]


def test_index_is_a_lancedb_table_that_needs_nothing_of_ours(index):
    table = lancedb.connect(index).open_table("videos")
    assert table.schema.names == [
        "path",
        "size_bytes",
        "modified_ns",
        "num_frames",
        "duration_seconds",
        "start_seconds",
        "end_seconds",
        "vector",
    ]
    rows = table.to_arrow().to_pylist()
    vectors, query = np.array([row["vector"] for row in rows], np.float32), np.array(rows[3]["vector"], np.float32)
    found = table.search(query).distance_type("dot").limit(5).to_list()
    np.testing.assert_allclose([1 - hit["_distance"] for hit in found], np.sort(vectors @ query)[::-1], atol=1e-5)
    assert {path.name for path in index.iterdir()} == {"videos.lance", "skipped.lance", ".lock"}


def test_a_video_that_is_gone_is_not_re_ranked_but_shown_last(model, videos, tmp_path):
    copies = [tmp_path / name for name in ("one.mp4", "two.mp4", "three.mp4")]
    for copy, video in zip(copies, sorted(videos.iterdir()), strict=False):
        copy.write_bytes(video.read_bytes())
    embed_videos(map(str, copies), model, tmp_path / "index")
    searcher = VideoSearcher(tmp_path / "index")
    best = searcher.search(QUERY, rerank=True)[0]
    os.remove(best.path)
    hits = searcher.search(QUERY, rerank=True)
    assert hits[-1].path == best.path and hits[-1].matching_score is None and "no such file" in hits[-1].unread_reason
    assert [line.split()[0] for line in format_hits(hits).splitlines()] == ["rank", "1", "2", "3"]
    assert "not read again" in format_hits(hits).splitlines()[-1]
    assert "matching" not in format_hits(searcher.search(QUERY))


def test_a_name_with_control_characters_does_not_reach_the_terminal(model, videos, tmp_path):
    """Neither in results nor among those skipped: it could colour, clear, or add lines to, what people read."""
    names = ["\x1b[31mred.mp4", "two\nlines.mp4", "caf\u00e9 \u65e5.mp4"]
    for name, video in zip(names, sorted(videos.iterdir()), strict=False):
        (tmp_path / name).write_bytes(video.read_bytes())
    (tmp_path / "bad\x07.mp4").write_bytes(b"no video")
    report = embed_videos([str(tmp_path)], model, tmp_path / "index")
    shown = report.format() + "\n" + format_hits(VideoSearcher(tmp_path / "index").search(QUERY))
    assert not {character for character in shown if not character.isprintable()} - {"\n"}
    for name in (
        "\\x1b[31mred.mp4",
        "two\\nlines.mp4",
        "caf\u00e9 \u65e5.mp4",
        "skipped " + str(tmp_path / "bad\\x07.mp4"),
    ):
        assert name in shown


def test_a_video_that_has_changed_is_marked(model, videos, tmp_path):
    files = [tmp_path / "videos" / name for name in ("one.mp4", "two.mp4", "three.mp4")]
    files[0].parent.mkdir()
    for file, video in zip(files, sorted(videos.iterdir()), strict=False):
        file.write_bytes(video.read_bytes())
    embed_videos([str(tmp_path / "videos")], model, tmp_path / "index")
    searcher = VideoSearcher(tmp_path / "index")
    assert not any(hit.has_changed for hit in searcher.search(QUERY))
    files[0].write_bytes(files[1].read_bytes())
    os.utime(files[0], ns=(1, 1))
    files[2].unlink()
    hits = searcher.search(QUERY)
    assert {Path(hit.path).name: hit.has_changed for hit in hits} == {
        "one.mp4": True,
        "two.mp4": False,
        "three.mp4": False,
    }
    marked = [line for line in format_hits(hits).splitlines() if line.endswith("(changed since it was embedded)")]
    assert len(marked) == 1 and "one.mp4" in marked[0]


def test_frames_are_recorded_and_must_stay(model, videos, tmp_path):
    video = str(sorted(videos.iterdir())[0])
    embed_videos([video], model, tmp_path / "index", num_frames=4)
    assert VideoSearcher(tmp_path / "index").encoder.num_frames == 4
    with pytest.raises(ValueError, match="built with --num-frames 4, and these vectors would be of --num-frames 2"):
        embed_videos([video], model, tmp_path / "index")


@pytest.mark.parametrize("kind", [UMTVideoTextForPreTraining, UMTVideoTextModel])
def test_other_kinds_of_folders(kind, videos, tmp_path):
    save_model(tmp_path / "model", kind)
    embed_videos([str(videos)], tmp_path / "model", tmp_path / "index")
    searcher = VideoSearcher(tmp_path / "index")
    assert len(searcher.search(QUERY)) == 5
    if kind is UMTVideoTextModel:
        with pytest.raises(ValueError, match="no matching head"):
            searcher.search(QUERY, rerank=True)
    else:
        assert searcher.search(QUERY, rerank=True)[0].matching_score is not None


def test_a_model_that_is_no_dual_encoder_is_refused(tmp_path, model):
    save_model(tmp_path / "answers", UMTVideoTextForQuestionAnswering)
    with pytest.raises(ValueError, match="is a video question answering folder .* use it with `umt-hf ask"):
        VideoTextEncoder(tmp_path / "answers")
    with pytest.raises(OSError, match="UMTVideoTextProcessor"):
        UMTVideoTextForRetrieval.from_pretrained(model).save_pretrained(tmp_path / "bare")
        UMTVideoProcessor().save_pretrained(tmp_path / "bare")
        VideoTextEncoder(tmp_path / "bare")


def test_fingerprint_sees_weights_alone(model, tmp_path):
    loaded = UMTVideoTextForRetrieval.from_pretrained(model)
    fingerprint = compute_fingerprint(loaded)
    assert compute_fingerprint(UMTVideoTextForRetrieval.from_pretrained(model)) == fingerprint
    with torch.no_grad():
        loaded.matching_head.bias[0] += 1e-3
    assert compute_fingerprint(loaded) != fingerprint
    left_out = ["matching_head.bias"]
    assert compute_fingerprint(loaded, left_out) == compute_fingerprint(
        UMTVideoTextForRetrieval.from_pretrained(model), left_out
    )


@pytest.mark.parametrize(
    "query,top_k,error,message",
    [
        (" ", 1, ValueError, "The query is empty; describe what the video shows"),
        (os.fsdecode(b"r\xf6t"), 1, ValueError, r"The query 'r\\udcf6t' is not UTF-8"),
        (QUERY, 0, ValueError, "top_k must be at least 1, got 0"),
        (None, 1, TypeError, "query must be a text, got None of type NoneType"),
        (QUERY, "3", TypeError, "top_k must be an integer, got '3' of type str"),
    ],
)
def test_searches_that_make_no_sense(index, query, top_k, error, message):
    with pytest.raises(error, match=f"^{message}"):
        VideoSearcher(index).search(query, top_k)


def test_vectors_that_are_not_finite_are_reported(model, videos, tmp_path, monkeypatch):
    def encode(self, pixel_values):
        vectors = torch.ones(len(pixel_values), 16)
        vectors[0] = torch.nan
        return vectors, None

    monkeypatch.setattr(VideoTextEncoder, "encode_videos", encode)
    report = embed_videos([str(videos)], model, tmp_path / "index", batch_size=5)
    assert report.num_in_index == 4 and "not finite" in report.skipped[0].reason


def test_listing(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("b.mp4", "deep/a.MKV", "deep/deeper/c.webm", "deep/notes.txt"):
        (tmp_path / name).write_bytes(b"12")
    found, missing = list_videos([str(tmp_path), str(tmp_path / "b.mp4"), str(tmp_path / "gone.mp4")])
    assert [file.path for file in found] == [str(tmp_path / n) for n in ("b.mp4", "deep/a.MKV", "deep/deeper/c.webm")]
    assert found[0].size_bytes == 2 and found[0].modified_ns == os.stat(tmp_path / "b.mp4").st_mtime_ns
    assert missing == [SkippedVideo(str(tmp_path / "gone.mp4"), "No such file or directory.")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos found"):
        list_videos([str(tmp_path / "empty")])


def test_missing_lancedb_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(video_index, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'umt_hf\[search\]'"):
        embed_videos(["nothing"], "no-model", tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_vectors_are_those_of_the_plain_loop_bit_by_bit(model, videos, num_workers):
    """Three videos at a time, read and computed in turn; one that cannot be read leaves its batch smaller."""
    encoder = VideoTextEncoder(model)
    bad = videos.parent / "bad.mp4"
    bad.write_bytes(b"no video")
    files = list_videos([*map(str, sorted(videos.iterdir())), str(bad)])[0]
    batches = list(encoder.read_batches(files, 3, num_workers))
    assert [video.path for batch in batches for video in batch.skipped] == [str(bad)]
    for start, batch in zip(range(0, len(files), 3), batches, strict=True):
        paths = [file.path for file in files[start : start + 3] if file.path != str(bad)]
        pixels = encoder.processor(videos=paths, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = encoder.model.get_video_features(pixels).pooler_output
            found = encoder.encode_videos(batch.pixel_values)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_precision_is_part_of_what_an_index_was_built_with(model, videos, tmp_path):
    said = []
    report = embed_videos([str(videos)], model, tmp_path / "index", dtype="bfloat16", announce=said.append)
    assert report.num_encoded == 5 and "% waiting for data" in said[-1]
    with pytest.raises(ValueError, match="built with --dtype bfloat16, and these vectors would be of --dtype float32"):
        embed_videos([str(videos)], model, tmp_path / "index")
    hits = VideoSearcher(tmp_path / "index").search(QUERY)  # the query in float32
    full = embed_videos([str(videos)], model, tmp_path / "full") and VideoSearcher(tmp_path / "full").search(QUERY)
    similarities = [{hit.path: hit.similarity for hit in own} for own in (hits, full)]
    differences = [abs(similarities[0][path] - similarities[1][path]) for path in similarities[1]]
    assert 0 < max(differences) < 0.02
    halves = [VideoTextEncoder(model, dtype=dtype).describe() for dtype in (torch.float32, torch.bfloat16)]
    assert halves[0].pop("dtype") == "float32" and halves[1].pop("dtype") == "bfloat16" and halves[0] == halves[1]
