"""The zoo's entries: whole, convertible, as published, and readable in a terminal."""

import io
import json
from functools import cache

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.hub.released import list_released_shapes
from umt_hf import cli
from umt_hf.hub_cards.convert_umt_checkpoint import (
    TASK_CLASSES,
    ConversionReport,
    build_published_config,
    convert_state_dict,
    describe_checkpoint,
)
from umt_hf.hub_cards.label_names import read_label_names
from umt_hf.inference.loading import list_class_names
from umt_hf.runs.config import list_recipes
from umt_hf.zoo import build_entry_table, build_zoo_table, filter_zoo, find_entry, load_task_titles, load_zoo

ZOO = load_zoo()
runner = CliRunner()


@cache
def convert_shapes(name: str) -> ConversionReport:
    entry = ZOO[name]
    config, task = build_published_config(name)
    source = {key: torch.empty(shape, device="meta") for key, shape in list_released_shapes(entry).items()}
    report = ConversionReport()
    converted = convert_state_dict(source, config, task, report)  # raises where a tensor is missing or left over
    assert report.used.keys() | report.set_aside.keys() == source.keys()
    with torch.device("meta"):
        assert converted.keys() == TASK_CLASSES[task](config).state_dict().keys()
    return report


def find_same_model(name: str) -> str:
    """The first entry of the same architecture: models of one differ in nothing but their weights."""
    entry = ZOO[name]
    key = ("task", "size", "frames", "resolution", "num_labels")
    return next(other.name for other in ZOO.values() if all(getattr(other, k) == getattr(entry, k) for k in key))


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_converts_from_a_file_of_its_real_shape(name):
    report = convert_shapes(find_same_model(name))
    assert set(report.set_aside.values()) <= {
        "equals the sinusoid table that the configuration computes",
        "part of the frozen teacher, which is loaded from openai/clip-vit-base-patch16",
        "part of the frozen teacher, which is loaded from openai/clip-vit-large-patch14",
        "numbers of the tokens, which the model counts itself",
        "repeats text_encoder.cls.predictions.bias",
        "repeats text_encoder.bert.cls.predictions.bias",
        "repeats text_decoder.cls.predictions.bias",
    }


def test_entries_are_whole():
    assert len(ZOO) == 47 and len({entry.file for entry in ZOO.values()}) == 47
    recipes = list_recipes()
    for entry in ZOO.values():
        config, task = build_published_config(entry.name)
        vision = getattr(config, "vision_config", config)
        assert (entry.task, entry.frames, entry.resolution) == (task, vision.num_frames, vision.image_size)
        assert entry.num_labels in (None, config.num_labels) and entry.trained_on
        assert entry.starts_from is None or entry.starts_from in ZOO
        assert (entry.tokenizer is not None) == (entry.max_text_tokens is not None) == hasattr(config, "text_config")
        assert entry.figures or task == "pretraining"
        assert all(0 < figure.value <= 100 and figure.source.startswith("https://") for figure in entry.figures)
        assert entry.recipe in recipes
        assert entry.weights_license == "unknown" and entry.repo == "OpenGVLab/UMT"


@pytest.mark.parametrize(
    "name,index,metric,value",
    [
        ("umt-vit-l16-k400-f16", 0, "top-1 accuracy", 90.6),
        ("umt-vit-b16-mit-384", 0, "top-1 accuracy", 45.5),
        ("umt-vit-l16-ava", 0, "frame mAP at IoU 0.5", 39.8),
        ("umt-vit-l16-25m", 0, "text to video R@1", 40.7),
        ("umt-vit-l16-25m", 24, "text to video R@1", 49.0),  # MSVD, after the authors' fix
        ("umt-vit-l16-25m-msrvtt", 5, "video to text R@10", 86.5),
        ("umt-vit-l16-25m-msvd-qa", 0, "top-1 accuracy", 55.2),
    ],
)
def test_published_figures(name, index, metric, value):
    figure = ZOO[name].figures[index]
    assert (figure.metric, figure.value) == (metric, value)


def test_slips_of_the_published_zoo_are_noted():
    assert (
        ZOO["umt-vit-b16-mit-384"].size == "b16" and "labels this row UMT-L/16" in ZOO["umt-vit-b16-mit-384"].notes[1]
    )
    assert ZOO["umt-vit-l16-25m-msvd-qa"].file.endswith("qa_msvd_l16_25m.pth")
    assert "inferred" in ZOO["umt-vit-l16-25m-msvd-qa"].notes[0]
    assert ZOO["umt-vit-b16-ssv2"].starts_from == "umt-vit-b16"


def test_entries_are_found_by_name_and_by_file():
    assert find_entry("l16_ptk710_ftk710_ftk400_f8_res224.pth") is find_entry("umt-vit-l16-k400")
    with pytest.raises(ValueError, match="Did you mean umt-vit-l16-k400"):
        find_entry("umt-vit-l16-k40")
    assert describe_checkpoint("umt-vit-b16") is ZOO["umt-vit-b16"]
    unreleased = describe_checkpoint("umt-vit-b16-17m-didemo")
    assert unreleased.file is None and not unreleased.figures and unreleased.max_text_tokens == 64
    assert describe_checkpoint("umt-vit-b16-k400-f16").frames == 16
    with pytest.raises(ValueError, match="umt-vit-b16-17m-didemos"):
        describe_checkpoint("umt-vit-b16-17m-didemos")


def test_filters():
    assert [entry.name for entry in filter_zoo("detection", "l16")] == ["umt-vit-l16-ava"]
    assert {entry.task for entry in filter_zoo(text="MSR-VTT")} == {"retrieval", "question_answering"}
    with pytest.raises(ValueError, match="classification"):
        filter_zoo("classify")


def test_tables_fit_80_columns():
    console = Console(width=80, file=io.StringIO())
    console.print(build_zoo_table(list(ZOO.values())))
    for entry in ZOO.values():
        console.print(build_entry_table(entry))
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for title in ("umt-vit-l16-25m-ssv2-template", *load_task_titles().values()):
        assert title in text


def test_command_lists_filters_and_shows():
    assert "umt-vit-l16-25m-msvd-qa" in runner.invoke(cli.app, ["zoo"]).output
    found = json.loads(runner.invoke(cli.app, ["zoo", "k400", "--size", "b16", "--json"]).output)
    assert [entry["name"] for entry in found] == ["umt-vit-b16-k400", "umt-vit-b16-mit", "umt-vit-b16-mit-384"]
    shown = runner.invoke(cli.app, ["zoo", "umt-vit-b16-ssv2"]).output
    assert "top-1 accuracy 70.8" in shown and "2 clips" in " ".join(shown.split()) and "unknown" in shown
    assert json.loads(runner.invoke(cli.app, ["zoo", "umt-vit-b16", "--json"]).output)["task"] == "pretraining"
    assert runner.invoke(cli.app, ["zoo", "umt-vit-b17"]).exit_code == 2
    assert runner.invoke(cli.app, ["zoo", "ava", "--task", "retrieval"]).exit_code == 1
    assert runner.invoke(cli.app, ["zoo", "--task", "dancing"]).exit_code == 2


@pytest.mark.parametrize(
    "name,content",
    [
        ("names.json", '["run", "jump, high", "sing"]'),
        ("names.json", '{"2": "sing", "0": "run", "1": "jump, high"}'),
        ("names.json", '{"run": "0", "jump, high": "1", "sing": "2"}'),
        ("kinetics.csv", 'id,name\n0,run\n1,"jump, high"\n2,sing\n'),
        ("moments.txt", 'sing,2\nrun,0\n"jump, high",1\n'),
        ("names.txt", "run\njump, high\nsing\n"),
    ],
)
def test_label_names(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert read_label_names(tmp_path / name, 3) == ["run", "jump, high", "sing"]


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("train.csv", "label,youtube_id,time_start,time_end,split\nrun,abc,0,10,train\n", "no order of the classes"),
        ("names.txt", "run\njump\n", "names 2 classes, the model has 3"),
        ("names.csv", "1,run\n2,jump\n3,sing\n", r"no name for \[0\]"),
        ("names.csv", "0,run,x\n1,jump,x\n2,sing,x\n", "two columns"),
        ("names.json", '{"run": 0, "jump": 0, "sing": 1}', "same index"),
        ("names.json", '{"run": "a"}', "expected"),
        ("names.json", "{", "names.json"),
    ],
)
def test_label_names_that_do_not_fit(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_label_names(tmp_path / name, 3)


HEADS = [name for name, entry in ZOO.items() if entry.num_labels]


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_names_where_their_order_is_known_and_else_a_reason(name):
    """Kinetics-400's are in no order of the alphabet, by two public lists; a guessed order would go unnoticed."""
    entry, names = ZOO[name], list_class_names(build_published_config(name)[0])
    assert len(names) == len(set(names)) == entry.num_labels
    unnamed = [label for number, label in enumerate(names) if label == f"LABEL_{number}"]
    assert not any(label.startswith("LABEL_") for label in set(names) - set(unnamed))
    if entry.data_set in ("Kinetics-400", "Kinetics-710"):
        assert names[:4] == ["riding a bike", "marching", "dodgeball", "playing cymbals"]
        assert names[399] == "playing badminton" and len(unnamed) == entry.num_labels - 400
    elif entry.data_set != "AVA v2.2":
        assert len(unnamed) == entry.num_labels
    assert (entry.unnamed is None) == (not unnamed)
    if unnamed:
        buffer = io.StringIO()
        Console(file=buffer, width=200).print(build_entry_table(entry))
        assert entry.unnamed in buffer.getvalue() and "--labels FILE" in buffer.getvalue()
