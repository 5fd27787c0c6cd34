"""Folders of ours as sentence-transformers loads them: the same scores, by its own modules, tools and trainer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import umt_hf  # noqa: F401 (registers the models)
from tests.e2e.pages import read_blocks
from tests.unit.inference.test_features import TINY
from tests.unit.inference.test_search import save_model
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)
from umt_hf.hub_cards.sentence_transformers import FILES, build_files, write_sentence_transformers_files
from umt_hf.moving_shapes.render import write_moving_shapes

TEXTS = ["a red circle moving left", "a green square", "circle"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    write_moving_shapes(folder, num_train_clips=4, num_validation_clips=1, num_test_clips=1)
    return sorted(map(str, (folder / "videos" / "train").iterdir()))


@pytest.fixture(scope="module", params=[UMTVideoTextModel, UMTVideoTextForPreTraining, UMTVideoTextForRetrieval])
def dual(request, tmp_path_factory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("dual"), request.param)
    write_sentence_transformers_files(folder)
    return folder


def load(folder: Path):
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder))


def compute_scores(folder: Path, videos: list[str]) -> np.ndarray:
    """`logits_per_video` times the temperature, `(videos, texts)`."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=TEXTS, videos=videos, padding=True, return_tensors="pt")
    with torch.no_grad():
        return (model(**inputs).logits_per_video * model.temperature).numpy()


@pytest.mark.parametrize(
    ("model_class", "kinds", "similarity"),
    [
        (UMTVideoTextModel, {"text", "video"}, "dot"),
        (UMTVideoTextForPreTraining, {"text", "video"}, "dot"),
        (UMTVideoTextForRetrieval, {"text", "video"}, "dot"),
        (UMTVideoModel, {"video"}, "cosine"),
        (UMTVideoForPreTraining, {"video"}, "cosine"),
        (UMTVideoForVideoClassification, {"video"}, "cosine"),
    ],
)
def test_files_name_methods_that_the_model_has(model_class, kinds, similarity):
    files = build_files(model_class.__name__)
    assert set(files) == set(FILES)
    config = files["sentence_bert_config.json"]["modality_config"]
    assert config.keys() == kinds
    loaded = UMTVideoTextModel if "text" in kinds else UMTVideoModel  # what AutoModel makes of the folder
    assert all(callable(getattr(loaded, entry["method"])) for entry in config.values())
    assert files["config_sentence_transformers.json"]["similarity_fn_name"] == similarity


def test_a_folder_whose_vectors_would_be_random_has_no_files(tmp_path):
    """Question answering has no projections: `AutoModel` would draw them."""
    write_sentence_transformers_files(tmp_path, UMTVideoTextForQuestionAnswering.__name__)
    assert not list(tmp_path.iterdir())


def test_unit_vectors_of_texts_give_the_scores(dual, videos):
    """Without the library: the two methods that its files name."""
    model, processor = AutoModel.from_pretrained(dual).eval(), AutoProcessor.from_pretrained(dual)
    text = processor(text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = model.get_text_embedding(**text).pooler_output
        clips = model.get_video_features(**processor(videos=videos, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(texts.norm(dim=-1), 1, atol=1e-6)
    np.testing.assert_allclose(clips @ texts.T, compute_scores(dual, videos), atol=1e-6)


def test_similarities_are_the_scores_of_the_model(dual, videos):
    model = load(dual)
    expected = compute_scores(dual, videos)
    assert expected.std() > 1e-3
    clips, texts = model.encode(videos), model.encode(TEXTS)
    assert clips.shape == (4, model.get_sentence_embedding_dimension()) and texts.shape == (3, clips.shape[1])
    np.testing.assert_allclose(model.similarity(clips, texts), expected, atol=1e-5)
    # A unit vector once more is another score: the mean of a video's unit vectors is shorter than 1 where it moves.
    unit = model.encode(videos, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    assert (np.linalg.norm(clips, axis=1) < 1 - 1e-4).any()
    # Batches do not matter, nor does the kind of input.
    one = np.concatenate([model.encode([video], batch_size=1) for video in videos])
    np.testing.assert_allclose(one, clips, atol=1e-5)


def test_a_folder_goes_round(dual, videos, tmp_path):
    """`save_pretrained` of the library writes a folder that both load."""
    model = load(dual)
    model.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(load(tmp_path / "saved").encode(videos), model.encode(videos), atol=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (dual, tmp_path / "saved"))
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("kind", [UMTVideoForPreTraining, UMTVideoForVideoClassification])
def test_encoders_without_text_give_vectors_of_videos(kind, videos, tmp_path):
    folder = tmp_path / "encoder"
    config = UMTVideoConfig(**TINY)
    kind(config).save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    write_sentence_transformers_files(folder, kind.__name__)
    model = load(folder)
    inputs = UMTVideoProcessor.from_pretrained(folder)(videos, return_tensors="pt")
    with torch.no_grad():
        expected = UMTVideoModel.from_pretrained(folder)(inputs.pixel_values).pooler_output
    found = model.encode(videos)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.diag(model.similarity(found, found)), 1, atol=1e-5)


SCRIPT = """
import json, sys
import umt_hf
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
print(json.dumps(model.encode(sys.argv[2:]).tolist()))
"""


def test_a_fresh_process_needs_one_import(dual, videos):
    expected = load(dual).encode(videos)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(dual), *videos], capture_output=True, text=True, timeout=300, check=True
    )
    np.testing.assert_allclose(json.loads(run.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_its_evaluator_and_its_trainer_take_a_folder(dual, videos, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = load(dual)
    queries, corpus = {"0": TEXTS[0]}, {str(i): video for i, video in enumerate(videos)}
    best = compute_scores(dual, videos)[:, 0].argmax()
    evaluator = InformationRetrievalEvaluator(queries, corpus, {"0": {str(best)}}, show_progress_bar=False)
    assert evaluator(model)["dot_accuracy@1"] == 1.0
    data = Dataset.from_dict({"anchor": TEXTS[:2], "positive": videos[:2]})
    before = model.encode(TEXTS)
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    library.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    ).train()
    assert np.abs(model.encode(TEXTS) - before).max() > 1e-4


def test_the_registry_of_lancedb_orders_videos_as_the_model(videos, tmp_path, monkeypatch, capsys):
    """The block of the guide as it stands; and what the guide warns of: a path that is not there is a text."""
    pytest.importorskip("lancedb")
    pytest.importorskip("sentence_transformers")
    (block,) = (block for block in read_blocks("docs/sentence_transformers.md") if "get_registry" in block.text)
    monkeypatch.chdir(tmp_path)
    folder = save_model(Path("outputs/retrieval"))
    write_sentence_transformers_files(folder)
    shutil.copytree(Path(videos[0]).parent, "videos")
    names: dict = {}
    exec(block.text, names)
    scores = compute_scores(folder, videos)[:, 0]
    expected = [f"videos/{Path(videos[i]).name}" for i in (-scores).argsort()]
    assert capsys.readouterr().out.splitlines()[-1] == str(expected[:3])

    def search(text: str) -> list[dict]:
        return names["table"].search(text).distance_type("dot").to_list()

    found = {hit["path"]: 1 - hit["_distance"] for hit in search(TEXTS[0])}
    np.testing.assert_allclose([found[path] for path in expected], np.sort(scores)[::-1], atol=1e-5)
    names["table"].add([{"path": "videos/mistyped.mp4"}])
    (row,) = (hit for hit in search(TEXTS[0]) if hit["path"] == "videos/mistyped.mp4")
    np.testing.assert_allclose(row["vector"], load(folder).encode("videos/mistyped.mp4"), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(row["vector"]), 1, atol=1e-5)  # a video's is shorter
