"""The evaluation scripts: reports, and two processes that give the numbers of one to the last bit."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.e2e.labelled import save_text_splits
from tests.parity.multi_modality import load_table
from tests.processes import run_ranks
from tests.unit.modeling.test_modeling_video_text import TINY
from umt_hf import UMTVideoProcessor, UMTVideoTextConfig, UMTVideoTextProcessor, VideoAnswerer, cli
from umt_hf.evaluation import multiple_choice as evaluate_multiple_choice
from umt_hf.evaluation import question_answering as evaluate_question_answering
from umt_hf.evaluation import retrieval as evaluate_retrieval
from umt_hf.modeling.modeling_umt_video_text import (
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextModel,
)
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.arguments import ReportArguments

ANSWERS = ["red", "blue", "yes", "no", "two"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    size = {"height": 32, "width": 32}
    tokenizer = build_tokenizer(load_table("text_rules")["tokenizer"]["vocab"], 16)
    processor = UMTVideoTextProcessor(UMTVideoProcessor(num_frames=2, size=size, do_center_crop=False), tokenizer)
    classes = {"stage2": UMTVideoTextForPreTraining, "qa": UMTVideoTextForQuestionAnswering, "dual": UMTVideoTextModel}
    for name, cls in classes.items():
        torch.manual_seed(0)
        model = cls(UMTVideoTextConfig(**TINY))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(shapes, tmp_path_factory) -> Path:
    """Five videos with seven texts, nine questions about four videos, and five rows of options."""
    folder = tmp_path_factory.mktemp("data")
    rows = json.loads((shapes / "test_captions.json").read_text())[:5]
    captions = [row["caption"] for row in rows]
    several = [["a dog in the snow", rows[0]["caption"]], *captions[1:4], ["two people", captions[4]]]
    retrieval = [{**row, "caption": texts} for row, texts in zip(rows, several, strict=True)]
    questions = [
        {"video": rows[i % 4]["video"], "question": f"what color is the {word}", "answer": "red", "question_id": i}
        for i, word in enumerate(["man", "dog", "cat", "ball", "car", "bike", "horse", "boat", "street"])
    ]
    choices = [{"video": row["video"], "caption": captions, "answer": i} for i, row in enumerate(rows)]
    for name, content in (("ret", retrieval), ("qa", questions), ("mc", choices), ("answers", ANSWERS)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def commands(models, data, shapes, tmp_path):
    """Command line of each script, which writes its report below `run`."""

    def build(run: str, batch_size: int = 2, precision: str = "no") -> dict[str, list[str]]:
        common = ["--data_root", shapes, "--per_device_eval_batch_size", batch_size, "--dataloader_num_workers", 0]
        common += ["--mixed_precision", precision]
        retrieval = ["--rerank_top_k", 3, "--dual_softmax", "true", "--cache_dir", tmp_path]
        answers = ["--answers", data / "answers.json", "--top_k", 4]
        found = {
            "retrieval": ["--model_name_or_path", models / "stage2", "--data", data / "ret.json", *retrieval],
            "question_answering": ["--model_name_or_path", models / "qa", "--data", data / "qa.json", *answers],
            "multiple_choice": ["--model_name_or_path", models / "stage2", "--data", data / "mc.json"],
        }
        return {
            name: [str(word) for word in [*words, *common, "--output_dir", tmp_path / run / name]]
            for name, words in found.items()
        }

    return build


def read(folder: Path) -> tuple[dict, list | None]:
    predictions = folder / "predictions.json"
    return json.loads((folder / "report.json").read_text()), (
        json.loads(predictions.read_text()) if predictions.exists() else None
    )


SCRIPTS = {
    "retrieval": evaluate_retrieval,
    "question_answering": evaluate_question_answering,
    "multiple_choice": evaluate_multiple_choice,
}


def evaluate(runs: list[dict[str, list[str]]]) -> None:
    """What each of two processes does: every script, in one precision after the other."""
    for commands in runs:
        for name, words in commands.items():
            SCRIPTS[name].main(words)
        AcceleratorState._reset_state()


def test_two_processes_equal_one(commands, tmp_path):
    """Batches of 2: three batches of videos, the last one odd. Batches of 8, in bf16: one process encodes nothing."""
    runs = []
    for size, precision in ((2, "no"), (8, "bf16")):
        for name, words in commands(f"one_{size}", size, precision).items():
            SCRIPTS[name].main(words)
            AcceleratorState._reset_state(reset_partial_state=True)
        runs.append(commands(f"two_{size}", size, precision))
    finished = run_ranks(evaluate, runs)
    assert finished.stderr.count("reranked_text_to_video_r1 ") == 2  # one process speaks, in each of two runs
    for size in (2, 8):
        for name in SCRIPTS:
            (one, choices_of_one), (two, choices_of_two) = (
                read(tmp_path / f"{n}_{size}" / name) for n in ("one", "two")
            )
            assert one["num_processes"] == 1 and two["num_processes"] == 2
            assert one["metrics"] == two["metrics"] != {}
            assert choices_of_one == choices_of_two
            assert {**one, "num_processes": 0, "output_dir": 0} == {**two, "num_processes": 0, "output_dir": 0}
        _, answers = read(tmp_path / f"two_{size}" / "question_answering")
        assert [answer["question_id"] for answer in answers] == list(range(9))


def test_report_of_retrieval(commands, data, tmp_path):
    metrics = evaluate_retrieval.main(commands("run")["retrieval"])
    report, _ = read(tmp_path / "run" / "retrieval")
    assert report["metrics"] == metrics
    assert report["num_videos"] == 5 and report["num_texts"] == 7
    assert report["data_sha256"] == hashlib.sha256((data / "ret.json").read_bytes()).hexdigest()
    expected = {"rerank_top_k": 3, "rerank": True, "dual_softmax": True, "num_frames": 2, "dtype": "float32"}
    assert {name: report[name] for name in expected} == expected
    assert {"dual_softmax_mean_recall", "reranked_video_to_text_median_rank"} < metrics.keys()
    assert report["versions"]["torch"] == torch.__version__
    assert not [path for path in tmp_path.iterdir() if path.is_file()]  # the videos' tokens are gone


def test_config_and_settings_of_the_processor(commands, models, tmp_path):
    config = tmp_path / "didemo.yaml"
    sections = {
        "model": {"model_name_or_path": str(models / "dual")},
        "data": {"num_frames": 3, "first_seconds": 0.5, "max_text_tokens": 6},
        "evaluation": {"rerank": False, "captions": "paragraph"},
    }
    config.write_text(yaml.safe_dump(sections))
    words = commands("run")["retrieval"][2:]
    metrics = evaluate_retrieval.main(["--config", str(config), *words])
    report, _ = read(tmp_path / "run" / "retrieval")
    assert report["num_texts"] == 5 and report["captions"] == "paragraph"
    assert report["num_frames"] == 3 and report["first_seconds"] == 0.5 and report["max_text_tokens"] == 6
    assert report["metrics"] == metrics and not any(name.startswith("reranked") for name in metrics)


def test_missing_weights_and_answers(commands, models, data, tmp_path):
    words = commands("run")
    dual = [word.replace("stage2", "dual") for word in words["retrieval"]]
    with pytest.raises(ValueError, match="is a video and text features folder .* needs a video-text retrieval folder"):
        evaluate_retrieval.main(dual)
    with pytest.raises(ValueError, match="Set data"):
        evaluate_multiple_choice.main(words["multiple_choice"][:2])
    rows = [{**row, "answer": None} for row in json.loads((data / "qa.json").read_text())]
    (tmp_path / "unknown.json").write_text(json.dumps(rows))
    qa = [*words["question_answering"], "--data", str(tmp_path / "unknown.json")]
    assert evaluate_question_answering.main(qa) == {}
    assert len(read(tmp_path / "run" / "question_answering")[1]) == 9


def test_a_bad_video_ends_both_processes(commands, data, shapes, tmp_path):
    rows = json.loads((data / "ret.json").read_text())
    rows[4]["video"] = str(tmp_path / "broken.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "broken.json").write_text(json.dumps(rows))
    words = [*commands("run")["retrieval"], "--data", str(tmp_path / "broken.json")]
    finished = run_ranks(evaluate_retrieval.main, words, exit_code=1)
    assert "broken.mp4" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_multiple_choice_says_what_it_tests_and_how_far_it_is(commands, models, data, tmp_path, caplog, capfd):
    """A report goes to the model's folder, or where that cannot be written to one of the model's name."""
    shutil.copytree(models / "stage2", tmp_path / "model")
    words = commands("run")["multiple_choice"][:-2]
    words[words.index("--model_name_or_path") + 1] = str(tmp_path / "model")
    (tmp_path / "model" / "run.yaml").write_text(f"data:\n  train_corpora: [other.json, {data}/mc.json]\n")
    with caplog.at_level("INFO"):
        evaluate_multiple_choice.main(words)
    assert f"{data}/mc.json: 5 videos with 5 questions, each of 5 captions." in caplog.text
    assert f"{tmp_path}/model was trained on {data}/mc.json, as {tmp_path}/model/run.yaml says" in caplog.text
    assert re.search(r"5/5 \[.*video/s", capfd.readouterr().err)
    assert (tmp_path / "model" / "test" / "report.json").is_file()


@pytest.mark.parametrize(("model", "folder"), [("me/model", "me--model"), ("model", "model")])
def test_reports_of_models_that_are_not_folders_have_their_names(model, folder):
    args = ReportArguments()
    args.choose_output_dir(model)
    assert args.output_dir == f"outputs/evaluation/{folder}"


FILES = {"retrieval": "ret", "question_answering": "qa", "multiple_choice": "mc"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dataset_is_tested_on_the_split_that_the_report_names(commands, data, shapes, tmp_path, name):
    """Its test split by default; a split that is missing is refused with those there are, and one of a file too."""
    rows = json.loads((data / f"{FILES[name]}.json").read_text())
    if name == "retrieval":  # a table has lists in all rows or in none
        rows = [
            {**row, "caption": [row["caption"]] if isinstance(row["caption"], str) else row["caption"]} for row in rows
        ]
    splits = {"train": rows, "validation": rows[:3], "test": rows[:2]}
    source = save_text_splits(tmp_path / "data", splits, shapes)
    words = commands("run")[name]
    for split, flags in (("test", []), ("validation", ["--split", "validation"])):
        SCRIPTS[name].main([*words, "--data", str(source), *flags])
        report, _ = read(tmp_path / "run" / name)
        assert report["split"] == split and report["num_videos"] == len({row["video"] for row in splits[split]})
    for split in ("val", "eval", "dev"):
        with pytest.raises(ValueError, match=f"split '{split}'.*test.*train.*validation"):
            SCRIPTS[name].main([*words, "--data", str(source), "--split", split])
    with pytest.raises(ValueError, match=r"split=validation: .*\.json has no splits"):
        SCRIPTS[name].main([*words, "--split", "validation"])
    SCRIPTS[name].main([*words, "--split", "test"])
    assert read(tmp_path / "run" / name)[0]["split"] is None


# Of each model a weight that every test of it uses, early and late.
POISONED = [
    ("retrieval", "stage2", "vision_model.layers.0.attention.q_proj.weight", "videos is NaN"),
    ("retrieval", "stage2", "text_projection.weight", "texts is NaN"),
    ("retrieval", "stage2", "matching_head.weight", "pairs is NaN"),
    ("multiple_choice", "stage2", "vision_model.layers.0.attention.q_proj.weight", "rows is NaN"),
    ("multiple_choice", "stage2", "matching_head.weight", "rows is NaN"),
    ("question_answering", "qa", "vision_model.layers.0.attention.q_proj.weight", "questions is NaN"),
    ("question_answering", "qa", "answer_decoder.lm_head.norm.weight", "questions is NaN"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "folder", "weight", "message"), POISONED)
def test_a_model_that_gives_nan_has_no_report(commands, models, tmp_path, name, folder, weight, message, value):
    poisoned = poison(models / folder, tmp_path / "poisoned", weight, value)
    words = [*commands("run")[name], "--model_name_or_path", str(poisoned)]
    ways = [words]
    if name == "question_answering":  # in the model's own words too
        ways.append([*words, "--answers", "none", "--top_k", "none"])
    for way in ways:
        with pytest.raises(ValueError, match=f"poisoned: .*{message}"):
            SCRIPTS[name].main(way)
    assert not (tmp_path / "run" / name).exists()


def test_nobody_is_answered_by_a_model_that_gives_nan(models, data, shapes, tmp_path):
    poisoned = poison(models / "qa", tmp_path / "poisoned", "answer_decoder.lm_head.norm.weight", float("nan"))
    video = str(shapes / json.loads((data / "qa.json").read_text())[0]["video"])
    for answers in (None, ANSWERS):
        with pytest.raises(ValueError, match="poisoned: .*is NaN"):
            VideoAnswerer(poisoned, device="cpu").answer(video, "what color is the man", answers)
    result = CliRunner().invoke(cli.app, ["ask", video, "what color is the man", "--model", str(poisoned)])
    assert result.exit_code == 2 and "NaN" in result.stderr and result.stdout == ""


def poison(folder: Path, copy: Path, weight: str, value: float) -> Path:
    """A copy of a model folder in which one number of a weight is not finite."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith(weight)]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("name", SCRIPTS)
def test_workers_that_are_not_forked(commands, forkserver, name):
    words = commands("none")[name]
    workers = [*commands("workers")[name], "--dataloader_num_workers", "1"]
    assert SCRIPTS[name].main(workers) == SCRIPTS[name].main(words) != {}
