"""Splits of `datasets` datasets in the scripts that train and test on labels, and in both stages."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from tests.e2e.labelled import COUNTS, build_test_flags, save_classifier, save_splits, save_text_splits, write_colors
from tests.e2e.runs import FINE_TUNING, to_flags
from umt_hf.data.splits import has_splits, require_split, select_data
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification as finetune_classification
from umt_hf.hub_cards.card import build_model_card
from umt_hf.runs.config import parse_config
from umt_hf.runs.folder import REPORT_FILE
from umt_hf.training import stage1, stage2
from umt_hf.training.arguments import CorpusArguments, DataArguments, PretrainingArguments


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    return write_colors(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory) -> Path:
    return save_splits(tmp_path_factory.mktemp("data") / "colors", videos)


@pytest.fixture(scope="module")
def parquet(data, tmp_path_factory) -> Path:
    """The same as a folder of Parquet files, named as the Hub names them."""
    folder = tmp_path_factory.mktemp("parquet") / "colors"
    (folder / "data").mkdir(parents=True)
    for split, table in load_from_disk(data).items():
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("model"))


def load_labelled(*, train_data: Path, **changes) -> finetune_classification.ClassificationData:
    flags = to_flags(model_name_or_path="start", train_data=train_data, **changes)
    return finetune_classification.load_labelled_videos(parse_config(finetune_classification.SECTIONS, flags)[1])


@pytest.mark.parametrize("form", ["data", "parquet"])
def test_an_evaluation_reads_the_test_split_and_its_report_names_it(form, model, request, tmp_path):
    source = request.getfixturevalue(form)
    for split, flags in (("test", {}), ("validation", {"split": "validation"}), ("train", {"split": "train"})):
        evaluate_classification.main(build_test_flags(model, source, tmp_path / split, **flags))
        report = json.loads((tmp_path / split / REPORT_FILE).read_text())
        assert (report["split"], report["num_videos"]) == (split, COUNTS[split])


@pytest.mark.parametrize("form", ["data", "parquet"])
def test_a_missing_split_is_refused_with_those_there_are(form, model, request, tmp_path):
    source = request.getfixturevalue(form)
    for split in ("val", "eval", "dev", "Test"):
        with pytest.raises(ValueError, match=rf"(?is){split}.*(test|train|validation).*(test|train|validation)"):
            evaluate_classification.main(build_test_flags(model, source, tmp_path / "test", split=split))
        with pytest.raises(ValueError, match=rf"(?is){split}.*(test|train|validation).*(test|train|validation)"):
            load_labelled(train_data=source, validation_split=split)
        with pytest.raises(ValueError, match=rf"(?is){split}.*(test|train|validation).*(test|train|validation)"):
            stage1.load_tables(DataArguments(train_data=str(source), train_split=split))
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize("form", ["data", "parquet"])
def test_fine_tuning_reads_a_split_for_each_of_its_data(form, request):
    source = request.getfixturevalue(form)
    found = load_labelled(train_data=source, validation_data=source, test_data=source)
    assert [len(part) for part in (found.train, found.validation, found.test)] == list(COUNTS.values())
    found = load_labelled(train_data=source, train_split="test", validation_split="train", test_split="validation")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [3, 12, 6]
    found = load_labelled(train_data=source, validation_data=source)
    assert len(found.validation) == COUNTS["validation"] and found.test is None
    with pytest.raises(ValueError, match="Set validation_data; or validation_ratio.*or validation_split"):
        load_labelled(train_data=source)


def test_sources_without_splits_refuse_one(videos, data, model, tmp_path):
    """A CSV, JSON, class folders and a single saved table; a default that is spelled out is not held against it."""
    rows = videos["test"]
    (tmp_path / "a.csv").write_text("\n".join(f"{path},{number}" for number, (path, _) in enumerate(rows)))
    (tmp_path / "a.json").write_text(json.dumps([{"video": path, "label": name} for path, name in rows]))
    for path, name in rows:
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "a.mp4").write_bytes(Path(path).read_bytes())
    load_from_disk(data)["test"].save_to_disk(tmp_path / "single")
    for name in ("a.csv", "a.json", "folder", "single"):
        source = tmp_path / name
        assert not has_splits(str(source))
        with pytest.raises(ValueError, match=f"split=validation: .*{name} has no splits"):
            evaluate_classification.main(build_test_flags(model, source, tmp_path / "test", split="validation"))
        for flags, message in (
            ({"train_split": "training"}, "train_split=training"),
            ({"validation_data": source, "validation_split": "val"}, "validation_split=val"),
            ({"validation_split": "validation"}, "validation_split=validation.*Set validation_data"),
            ({"validation_data": source, "test_split": "test"}, "test_split=test.*Set test_data"),
        ):
            with pytest.raises(ValueError, match=message):
                load_labelled(train_data=source, **flags)
        with pytest.raises(ValueError, match="train_split=training"):
            stage1.load_tables(DataArguments(train_data=str(source), train_split="training"))
        with pytest.raises(ValueError, match="train_splits=training"):
            arguments = CorpusArguments(train_corpora=[str(source)], train_splits=["training"])
            stage2.load_corpora(arguments, PretrainingArguments())
        evaluate_classification.main(build_test_flags(model, source, tmp_path / "test", split="test"))
        assert json.loads((tmp_path / "test" / REPORT_FILE).read_text())["split"] is None


def test_stage_1_reads_the_splits_that_it_is_given(data):
    train, held_out = stage1.load_tables(DataArguments(train_data=str(data)))
    assert len(train) == COUNTS["train"] and held_out is None
    train, held_out = stage1.load_tables(DataArguments(train_data=str(data), validation_data=str(data)))
    assert (len(train), len(held_out)) == (COUNTS["train"], COUNTS["validation"])
    splits = {"train_split": "test", "validation_split": "train"}
    train, held_out = stage1.load_tables(DataArguments(train_data=str(data), **splits))
    assert (len(train), len(held_out)) == (COUNTS["test"], COUNTS["train"])


def test_stage_2_reads_a_split_of_each_corpus_and_validates_on_the_validation_split(videos, tmp_path, monkeypatch):
    rows = {
        split: [{"video": path, "caption": f"{name} {number}"} for number, (path, name) in enumerate(own)]
        for split, own in videos.items()
    }
    source = str(save_text_splits(tmp_path / "data", rows, Path("/")))
    (tmp_path / "a.json").write_text(json.dumps(rows["validation"]))
    found = stage2.load_corpora(CorpusArguments(train_corpora=[source]), PretrainingArguments())
    assert len(found[0].table) == COUNTS["train"]
    arguments = CorpusArguments(train_corpora=[source, str(tmp_path / "a.json")], train_splits=["test", "train"])
    found = stage2.load_corpora(arguments, PretrainingArguments())
    assert len(found[0].table) == COUNTS["test"] + COUNTS["validation"]  # corpora of one kind are mixed
    with pytest.raises(ValueError, match="train_splits has 3 values for 2 corpora"):
        CorpusArguments(train_corpora=[source, source], train_splits=["train"] * 3)

    held_out, load = [], stage2.load_retrieval_set
    monkeypatch.setattr(stage2, "require_towers", lambda _: None)  # none is loaded here
    monkeypatch.setattr(stage2, "require_tokenizer", lambda _: None)

    def stop(*given, **options):
        held_out.append(load(*given, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage2, "load_retrieval_set", stop)
    for split, flags in (("validation", {}), ("test", {"validation_split": "test"})):
        with pytest.raises(KeyboardInterrupt):
            stage2.main(to_flags(train_corpora=[source], validation_data=source, output_dir=tmp_path / "run", **flags))
        assert len(held_out[-1].videos) == COUNTS[split]
    with pytest.raises(ValueError, match="validation_split=test: .*Set validation_data"):
        stage2.main(to_flags(train_corpora=[source], validation_split="test", output_dir=tmp_path / "run"))


def test_a_card_names_the_splits_of_its_figures(data, model, tmp_path):
    """Of the run's own tests and of a later report, in the table and in the metadata."""
    run = tmp_path / "run"
    fields = {**FINE_TUNING, "model_name_or_path": model, "train_data": data, "output_dir": run, "max_steps": 1}
    finetune_classification.main(to_flags(**fields, validation_split="test", test_split="train"))
    evaluate_classification.main(build_test_flags(run, data, run / "report", split="validation"))
    card = build_model_card(run)
    splits = {result.metric_name: [] for result in card.data.eval_results}
    for result in card.data.eval_results:
        splits[result.metric_name].append(result.dataset_split)
        assert result.dataset_name == "colors"
    assert "It answers with one of its 3 classes whatever the video shows" in card.content
    assert splits["top-1 accuracy"][:2] == ["test", "train"]
    (viewed,) = [value for name, value in splits.items() if name.startswith("top-1 accuracy, ")]
    assert viewed == ["validation"] and "| colors | validation | top-1 accuracy |" in card.content
    assert {"macro F1", "mean class accuracy"} <= splits.keys()


def test_a_split_that_is_not_there_is_never_guessed(tmp_path):
    table = Dataset.from_dict({"video": ["a.mp4", "b.mp4"], "label": [0, 1]})
    DatasetDict({"train": table, "val": concatenate_datasets([table, table])}).save_to_disk(tmp_path / "data")
    source = str(tmp_path / "data")
    with pytest.raises(ValueError, match="no split 'validation'; it has .*train.*val"):
        load_labelled(train_data=source, validation_data=source)
    assert len(load_labelled(train_data=source, validation_split="val").validation) == 4


def test_rules_of_splits(data):
    assert require_split("name/on-the-hub", "test", "train") == "test" and has_splits("name/on-the-hub")
    assert require_split("a.csv", None, "train") == "train" == require_split("a.csv", "train", "train")
    assert select_data(DataArguments(), "train") is None
    assert select_data(DataArguments(train_data=str(data), validation_split="x"), "validation") == (str(data), "x")
