"""`umt-hf convert` from a Hub on this machine and from files: complete folders, or clear words and no folder."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import (
    AutoModel,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    AutoVideoProcessor,
    GenerationConfig,
)
from typer.testing import CliRunner

import umt_hf  # noqa: F401 (registers the models)
from tests.hub.released import (
    NARROW,
    NARROW_WIDTHS,
    build_released_tensors,
    list_released_shapes,
    write_bert_tokenizer,
)
from tests.hub.server import LoopbackHub
from tests.parity import multi_modality, reference
from tests.parity.test_student_parity import build_config
from umt_hf import VideoClassifier, cli
from umt_hf.hub_cards import released_checkpoints as conversion
from umt_hf.hub_cards.convert_umt_checkpoint import build_published_config
from umt_hf.modeling.modeling_umt_video import UMTVideoModel
from umt_hf.zoo import find_entry

runner = CliRunner()
TEXT_CASES = {
    "umt-vit-b16-25m": ("umt_pretrain_video", "video_text_pretraining"),
    "umt-vit-b16-25m-didemo": ("umt_retrieval_train", "retrieval"),
    "umt-vit-b16-25m-msvd-qa": ("video_qa", "question_answering"),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        yield hub


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def convert(*arguments, exit_code=0):
    """What the command says: on standard output if it goes well, else in the box, without its frame."""
    result = runner.invoke(cli.app, ["convert", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.stdout if exit_code == 0 else " ".join(result.output.replace("│", " ").split())


def use_tiny(monkeypatch, config, task):
    monkeypatch.setattr(conversion, "build_published_config", lambda name: (config, task))


@pytest.fixture
def tiny(here, monkeypatch):
    """A stage-1 file of a tiny model, under the name of umt-vit-b16's, and its tensors."""
    info, data = reference.load_case("student_k2_layerscale")
    torch.save({"model": data["weights"]}, here / "b16_ptk710_f8_res224.pth")
    use_tiny(monkeypatch, build_config(info["constructor"]), "pretraining")
    return data["weights"]


@pytest.mark.parametrize(
    ("name", "first", "last", "reason"),
    [
        ("umt-vit-b16-k400", "riding a bike", "playing badminton", None),
        ("umt-vit-b16-k710", "riding a bike", "LABEL_709", "the order of the other 310 is not public"),
        ("umt-vit-b16-ssv2", "LABEL_0", "LABEL_173", "two orders of the classes are in public use"),
    ],
)
def test_a_head_answers_with_names_or_says_why_not(name, first, last, reason, here, monkeypatch):
    """From a file: the folder's labels, and the reason in what the command says, in `info` and in the card."""
    entry = find_entry(name)
    config, task = build_published_config(name)
    for field, value in NARROW.items():
        setattr(config, field, value)
    shapes = {
        key: [NARROW_WIDTHS.get(size, size) for size in shape] for key, shape in list_released_shapes(entry).items()
    }
    torch.save({"module": build_released_tensors(entry, shapes)}, here / Path(entry.file).name)
    use_tiny(monkeypatch, config, task)
    said = convert(Path(entry.file).name)
    labels = VideoClassifier(name).labels
    assert (labels[0], labels[-1], len(labels)) == (first, last, entry.num_labels)
    info = runner.invoke(cli.app, ["info", name]).stdout
    card = (here / name / "README.md").read_text()
    for text in (" ".join(words.split()) for words in (said, info, card)):
        assert ("--labels FILE" in text) == (reason is not None)
        assert reason is None or reason in text
    (here / "names.txt").write_text("".join(f"class {i}\n" for i in range(entry.num_labels)))
    assert "--labels FILE" not in convert(Path(entry.file).name, "--labels", "names.txt", "--overwrite")
    assert VideoClassifier(name).labels[-1] == f"class {entry.num_labels - 1}"


@pytest.mark.heavy
@pytest.mark.slow
def test_by_name_at_real_size(hub, here, tmp_path):
    """The whole way of the README: download, folder, `AutoModel`; then the file from the cache, with the Hub away."""
    entry = find_entry("umt-vit-b16-k710")
    source = tmp_path / "source.pth"
    torch.save({"module": build_released_tensors(entry)}, source)
    (tmp_path / "k710.csv").write_text("id,name\n" + "".join(f"{i},class {i}\n" for i in range(710)))
    repo = hub.add_repo(entry.repo, {entry.file: source})
    options = ["--labels", tmp_path / "k710.csv", "--max-shard-size", "150MB", "--json"]
    report = json.loads(convert(entry.name, *options))
    assert report["commit"] == repo.branches["main"] and report["output_difference"] == 0.0
    assert report["sha256"] == hub.repo(entry.repo).find("main").files[entry.file].sha256
    assert not report["set_aside"] and report["num_used"] == 162

    folder = here / entry.name
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors.index.json", "video_preprocessor_config.json", "README.md"}
    assert sum(name.endswith(".safetensors") for name in names) == 3
    model, info = AutoModelForVideoClassification.from_pretrained(entry.name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.id2label[709] == "class 709"
    processor = AutoVideoProcessor.from_pretrained(entry.name)
    assert model(**processor(torch.zeros(8, 3, 32, 40), return_tensors="pt")).logits.shape == (1, 710)
    assert repo.branches["main"] in (folder / "README.md").read_text()

    if "huggingface.co" not in inspect.getsource(ModelCard.validate):  # old clients ask that host alone
        ModelCard.load(folder / "README.md").validate()  # the Hub's own check, as this Hub makes it
        assert hub.count_requests("POST /api/validate-yaml") == 1

    requests = len(hub.requests)
    hub.down()
    cached = conversion.download_checkpoint(entry, revision=report["commit"])
    assert (
        cached.commit == report["commit"]
        and cached.path.stat().st_size == source.stat().st_size
        and len(hub.requests) == requests
    )


@pytest.mark.parametrize("name", TEXT_CASES)
def test_models_with_text_are_complete(name, hub, here, tmp_path, monkeypatch):
    """Tiny weights of the published implementation, downloaded, with the tokenizer."""
    case, task = TEXT_CASES[name]
    info, data = multi_modality.load_case(case)
    config = multi_modality.build_config(info)
    use_tiny(monkeypatch, config, task)
    entry = find_entry(name)
    torch.save({"model": data["weights"]}, tmp_path / "source.pth")
    hub.add_repo(entry.repo, {entry.file: tmp_path / "source.pth"})
    hub.add_repo(entry.tokenizer, write_bert_tokenizer(tmp_path / "bert", config.text_config.vocab_size))
    assert "outputs differ by 0" in convert(name)
    processor = AutoProcessor.from_pretrained(name)
    assert processor.tokenizer.model_max_length == entry.max_text_tokens
    assert processor.video_processor.sampling_strategy == "middle"
    assert processor.video_processor.first_seconds == entry.processor.get("first_seconds")
    side = config.vision_config.image_size
    video, rate = [torch.zeros(16, 3, side, side)], [{"total_num_frames": 16, "fps": 8.0}]
    inputs = processor(text=["word110 word111"], videos=video, video_metadata=rate, padding=True, return_tensors="pt")
    model_class = AutoModelForVisualQuestionAnswering if task == "question_answering" else AutoModel
    model = model_class.from_pretrained(name)
    if task == "question_answering":
        assert GenerationConfig.from_pretrained(name).eos_token_id == model.answer_decoder.config.sep_token_id
        assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    else:
        assert model(**inputs).logits_per_video.shape == (1, 1)
    assert not UMTVideoModel.from_pretrained(name, output_loading_info=True)[1]["missing_keys"]


def test_a_file_tells_what_it_is_by_its_name(tiny, here):
    assert "umt-vit-b16: UMTVideoForPreTraining" in convert("b16_ptk710_f8_res224.pth")
    assert not list(here.glob("*.unfinished")) and not list(here.glob("*.old"))
    (here / "b16_ptk710_f8_res224.pth").rename(here / "mine.pth")
    assert "Say what mine.pth is" in convert("mine.pth", exit_code=2)
    assert "--overwrite" in convert("mine.pth", "umt-vit-b16", exit_code=2)
    (here / "umt-vit-b16" / "stale.txt").write_text("old")
    convert("mine.pth", "umt-vit-b16", "--overwrite")
    assert not (here / "umt-vit-b16" / "stale.txt").exists() and (here / "umt-vit-b16" / "config.json").exists()
    (here / "photos").mkdir()
    (here / "photos" / "a.jpg").write_bytes(b"mine")
    for place, message in (("photos", "holds something else"), (".", "written over what it is made from")):
        options = ["mine.pth", "umt-vit-b16", "--output", place, "--overwrite"]
        assert message in convert(*options, exit_code=2)
    assert (here / "photos" / "a.jpg").exists() and (here / "mine.pth").exists()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, None])
def test_precision_of_the_file_is_kept(precision, tiny, here):
    tensors = {name: tensor.to(precision or torch.float16) for name, tensor in tiny.items()}
    if precision is None:  # several: all in the highest
        tensors["encoder.norm.weight"] = tiny["encoder.norm.weight"]
    torch.save(tensors, here / "half.pth", _use_new_zipfile_serialization=precision != torch.bfloat16)
    convert("half.pth", "umt-vit-b16")
    assert AutoModel.from_pretrained("umt-vit-b16").dtype == (precision or torch.float32)


def test_a_file_that_does_not_fit_names_its_tensors_and_leaves_nothing(tiny, here):
    tensors = {**tiny, "encoder.surprise": torch.zeros(1)}
    del tensors["encoder.norm.weight"]
    torch.save(tensors, here / "other.pth")
    output = convert("other.pth", "umt-vit-b16", exit_code=2)
    assert "other.pth does not fit umt-vit-b16" in output
    assert "no place for encoder.surprise" in output and "missing vision_model.norm.weight" in output
    assert sorted(path.name for path in here.iterdir()) == ["b16_ptk710_f8_res224.pth", "other.pth"]


def test_a_folder_that_does_not_give_back_the_file_is_refused(tiny, here, monkeypatch):
    save = conversion.load_converted_model

    def load_and_spoil(converted, config, task):
        model = save({name: tensor.clone() for name, tensor in converted.items()}, config, task)
        with torch.no_grad():
            model.alignment_heads[0].dense.bias[0] += 1e-3
        return model

    monkeypatch.setattr(conversion, "load_converted_model", load_and_spoil)
    with pytest.raises(RuntimeError, match="1 weights changed.*alignment_heads.0.dense.bias"):
        conversion.convert_released_checkpoint("b16_ptk710_f8_res224.pth")
    assert not (here / "umt-vit-b16").exists() and not list(here.glob("*.unfinished"))


def test_what_cannot_be_had_is_said_before_anything_is_written(hub, here, tmp_path, monkeypatch):
    entry = find_entry("umt-vit-b16")
    hint = f"umt-hf convert b16_ptk710_f8_res224.pth {entry.name}"
    assert hint in convert("umt-vit-b16", exit_code=2)  # no such repository
    hub.add_repo(entry.repo, {"other.txt": b""})
    assert "cannot be fetched" in convert("umt-vit-b16", exit_code=2)  # no such file
    assert "v9" in convert("umt-vit-b16", "--revision", "v9", exit_code=2)
    assert "--tokenizer FOLDER" in convert("umt-vit-b16-25m", exit_code=2)
    assert hub.count_requests(r"resolve/.*b16_25m\.pth") == 0  # the tokenizer is asked for before the weights
    write_bert_tokenizer(tmp_path / "small", 120)
    assert "120 words" in convert("umt-vit-b16-25m", "--tokenizer", tmp_path / "small", exit_code=2)
    assert "reads no text" in convert("umt-vit-b16", "--tokenizer", tmp_path / "small", exit_code=2)
    (tmp_path / "names.txt").write_text("run\n")
    assert "has no classes" in convert("umt-vit-b16", "--labels", tmp_path / "names.txt", exit_code=2)
    assert "the model has 400" in convert("umt-vit-b16-k400", "--labels", tmp_path / "names.txt", exit_code=2)
    assert "no such file" in convert("missing.pth", exit_code=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be fetched" in convert("umt-vit-l16", exit_code=2)
    assert not list(here.iterdir())
