"""`examples/upstream/umt_models.py` in mteb: what it says of the models, and scores as of our own evaluation."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Video
from transformers import AutoModel, AutoProcessor

from tests.e2e.conftest import ROOT
from tests.unit.inference.test_search import save_model
from umt_hf import UMTVideoTextForRetrieval, UMTVideoTextModel
from umt_hf.data.annotations import load_retrieval_set
from umt_hf.evaluation import retrieval
from umt_hf.hub_cards.convert_umt_checkpoint import build_published_config
from umt_hf.moving_shapes.render import write_moving_shapes
from umt_hf.processing.containers import import_torchcodec
from umt_hf.zoo import load_zoo

NUM_CLIPS = 32


@pytest.fixture(scope="module")
def metas() -> dict:
    """What the file says of each model, by our name of it."""
    models = pytest.importorskip("mteb").models
    found = runpy.run_path(str(ROOT / "examples" / "upstream" / "umt_models.py")).values()
    return {value.name.removeprefix("your-account/"): value for value in found if isinstance(value, models.ModelMeta)}


@pytest.fixture(scope="module")
def clips(metas, tmp_path_factory) -> tuple[Path, Path]:
    """A list of clips whose captions differ, and a folder that finds some of them."""
    if find_spec("torchcodec") is None:
        pytest.skip("mteb loads no model of videos without torchcodec: `pip install 'mteb[video]'`")
    folder = tmp_path_factory.mktemp("clips")
    write_moving_shapes(folder, num_train_clips=1, num_validation_clips=1, num_test_clips=48)
    rows = json.loads((folder / "test_captions.json").read_text())
    rows = list({row["caption"]: row for row in rows}.values())[:NUM_CLIPS]
    (folder / "list.json").write_text(json.dumps(rows))
    words = sorted({word for row in rows for word in row["caption"].split()})
    source = save_model(folder / "model", words=words)
    model, processor = UMTVideoTextForRetrieval.from_pretrained(source), AutoProcessor.from_pretrained(source)
    found = retrieval.encode_retrieval_set(
        model, processor, load_retrieval_set(str(folder / "list.json")), Accelerator(cpu=True), num_workers=0
    )
    inputs = processor(text=[row["caption"] for row in rows], return_tensors="pt")
    with torch.no_grad():  # half of the texts are led to the vectors of their videos
        states = model.text_model(**inputs).last_hidden_state[:, 0]
        model.text_projection.weight.copy_(torch.linalg.lstsq(states[::2], found.video_embeds[::2]).solution.T)
        model.text_projection.bias.zero_()
    model.save_pretrained(source)
    return folder / "list.json", source


def build_task(source: Path, way: str, is_decoded: bool):
    """A task of mteb on the clips of a list: "t2v" asks for videos by texts, "v2t" for texts by videos."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    rows = json.loads(source.read_text())
    ids = [str(number) for number in range(len(rows))]
    texts = Dataset.from_dict({"id": ids, "text": [row["caption"] for row in rows]})
    videos = Dataset.from_dict({"id": ids, "video": [str(source.parent / row["video"]) for row in rows]})
    videos = videos.cast_column("video", Video(decode=is_decoded))
    queries, corpus = (texts, videos) if way == "t2v" else (videos, texts)
    unknown = dict.fromkeys(
        ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
        + ("sample_creation", "bibtex_citation")
    )

    class Clips(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Clips",
            description="Clips that were rendered.",
            dataset={"path": "none/none", "revision": "none"},
            type="Any2AnyRetrieval",
            category=way,
            modalities=["text", "video"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
            **unknown,
        )

        def load_data(self, **_) -> None:
            found = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": found}}, True

    relevant = {number: {number: 1} for number in ids}
    return Clips()


@pytest.mark.parametrize("is_decoded", [False, True])
@pytest.mark.parametrize(("way", "name"), [("t2v", "text_to_video"), ("v2t", "video_to_text")])
def test_mteb_gives_the_recalls_and_the_order_of_the_command(metas, clips, tmp_path, way, name, is_decoded):
    import mteb

    source, folder = clips
    if is_decoded:
        try:
            import_torchcodec()
        except ImportError as error:
            pytest.skip(str(error))
    model = metas["umt-vit-b16-25m"].model_copy(update={"name": str(folder)}).load_model()
    result = mteb.evaluate(model, build_task(source, way, is_decoded), cache=None, prediction_folder=tmp_path)
    figures = result.task_results[0].scores["test"][0]

    words = ["--model_name_or_path", folder, "--data", source, "--output_dir", tmp_path / "ours"]
    retrieval.main([*map(str, words), "--rerank", "false", "--dataloader_num_workers", "0"])
    report = json.loads((tmp_path / "ours" / "report.json").read_text())
    assert report["num_videos"] == report["num_texts"] == NUM_CLIPS
    assert 0.1 < report["metrics"][f"dual_{name}_r1"] < 0.9  # else equal figures say little
    for k in (1, 5, 10):
        assert figures[f"recall_at_{k}"] == pytest.approx(report["metrics"][f"dual_{name}_r{k}"], abs=1e-5)

    own = retrieval.encode_retrieval_set(
        UMTVideoTextModel.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
        load_retrieval_set(str(source)),
        Accelerator(cpu=True),
        num_workers=0,
    )
    expected = own.text_embeds @ own.video_embeds.T
    expected = expected if way == "t2v" else expected.T
    assert expected.std() > 1e-2
    predictions = json.loads((tmp_path / "Clips_predictions.json").read_text())["default"]["test"]
    for query, scores in predictions.items():
        found = torch.tensor([scores[str(number)] for number in range(NUM_CLIPS)])
        torch.testing.assert_close(found, expected[int(query)], rtol=0, atol=1e-5)
        assert sorted(scores, key=scores.get)[-1] == str(expected[int(query)].argmax().item())


def test_figures_are_those_of_the_zoo_and_of_the_models(metas):
    import mteb

    entries = {name: e for name, e in load_zoo().items() if e.task in ("video_text_pretraining", "retrieval")}
    assert metas.keys() == entries.keys() and len(metas) == 20
    sizes = {}
    for name in ("umt-vit-b16-25m", "umt-vit-l16-25m"):
        config, _ = build_published_config(name)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        embeddings = model.get_input_embeddings().weight.numel()
        sizes[name[8:11]] = (count, embeddings, round(count * 4 / 2**20), config.projection_dim)
    for name, entry in entries.items():
        meta = metas[name]
        figures = (meta.n_parameters, meta.n_embedding_parameters, meta.memory_usage_mb, meta.embed_dim)
        assert figures == sizes[entry.size]
        assert meta.max_tokens == entry.max_text_tokens and meta.public_training_code == entry.code_url
        parent = entry.starts_from if entry.task == "retrieval" else None
        assert meta.adapted_from == (parent and f"your-account/{parent}")
        assert (meta.license is None) == (entry.weights_license == "unknown")
    mteb.get_tasks(tasks=sorted(set().union(*(meta.training_datasets for meta in metas.values()))))  # it knows all
