"""Exported graphs answer as the model at every shape, with the processor beside them; what is missing is named."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from tests.processes import read_output, start_process
from tests.unit.inference.test_search import save_model
from tests.unit.modeling.tiny_models import build_config, build_model
from tests.unit.video_files import write_video
from umt_hf import (
    ExportedVideoModel,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextForRetrieval,
    VideoClassifier,
    cli,
)
from umt_hf.inference import export
from umt_hf.inference.export import Tower, compare, export_model, load_exported, require_exporters
from umt_hf.inference.loading import compute_fingerprint
from umt_hf.inference.search import VideoTextEncoder

try:
    from transformers.exporters import ExportedModel
except ImportError:
    ExportedModel = None

needs_exporters = pytest.mark.skipif(
    ExportedModel is None, reason=f"transformers.exporters came with Transformers {export.EXPORTERS_VERSION}"
)
FORMATS = ("torch", "onnx", "openvino")
# Videos, frames, height, width: as trained; one frame; more frames; another size; not square; one row of patches.
SHAPES = ((2, 2, 32, 32), (1, 1, 32, 32), (1, 7, 32, 32), (1, 2, 64, 64), (3, 3, 40, 24), (1, 2, 8, 48))
FRESH = {"position_embedding_frames": None, "position_embedding_image_size": None}


def require_format(format):
    try:
        require_exporters(export.TRANSFORMERS_FORMATS[format])
    except ImportError as error:
        pytest.skip(str(error))


def spread(model):
    """Weights that are large enough for differences to show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def save(model, folder):
    spread(model).save_pretrained(folder)
    UMTVideoProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {
        "stage1": save(build_model(UMTVideoForPreTraining), root / "stage1"),
        "fresh": save(build_model(UMTVideoModel, **FRESH), root / "fresh"),
        "learnable": save(build_model(UMTVideoModel, learnable_position_embedding=True), root / "learnable"),
        "tubelets": save(build_model(UMTVideoModel, tubelet_size=2, num_frames=4), root / "tubelets"),
        "classifier": save(build_model(UMTVideoForVideoClassification), root / "classifier"),
        "attentive": save(build_model(UMTVideoForVideoClassification, pooling_type="attentive"), root / "attentive"),
        "detector": save(build_model(UMTVideoForActionDetection), root / "detector"),
        "retrieval": save_model(root / "retrieval", UMTVideoTextForRetrieval),
    }


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """Exports a folder once and gives where."""
    done = {}

    def export_once(kind, format, part="model"):
        require_format(format)
        if (kind, format, part) not in done:
            out = tmp_path_factory.mktemp("exported") / kind
            report = export_model(folders[kind], out, format, part)
            assert report.largest_difference < 1e-5
            done[kind, format, part] = out
        return done[kind, format, part]

    return export_once


def list_shapes(format):
    """Without one row of patches in a graph of `torch.export`, which refuses it."""
    return SHAPES[:-1] if format == "torch" else SHAPES


def check_shapes(run, module, patch, shapes):
    """Every output at every shape; heights and widths of `shapes` are those of patches of 8 pixels."""
    torch.manual_seed(2)
    for batch, frames, height, width in shapes:
        video = torch.randn(batch, frames, 3, height * patch // 8, width * patch // 8)
        with torch.no_grad():
            expected = module(pixel_values=video)
        found = run(pixel_values=video)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=f"{name} at {video.shape}")


@needs_exporters
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "kind",
    [
        "classifier",
        *(pytest.param(name, marks=pytest.mark.heavy) for name in ("fresh", "stage1", "learnable", "attentive")),
    ],
)
def test_graphs_answer_as_the_model_at_six_shapes(kind, format, exported, folders):
    folder = exported(kind, format)
    (module,) = export.load_graphs(folders[kind], "model")[0].values()
    graph = load_exported(folder, trust_remote_code=True)
    check_shapes(graph, module, module.config.patch_size, list_shapes(format))
    if format == "torch":
        with pytest.raises(AssertionError, match="Guard failed"):
            check_shapes(graph, module, module.config.patch_size, SHAPES[-1:])


@pytest.mark.heavy
@needs_exporters
@pytest.mark.parametrize("format", FORMATS)
def test_tubelets_of_several_frames_are_exported_too(format, exported, folders):
    (module,) = export.load_graphs(folders["tubelets"], "model")[0].values()
    shapes = [(batch, 2 * frames, height, width) for batch, frames, height, width in list_shapes(format)]
    if format == "torch":  # which refuses one tubelet as it refuses one row of patches
        shapes = [shape for shape in shapes if shape[1] > 2]
    check_shapes(load_exported(exported("tubelets", format), trust_remote_code=True), module, 8, shapes)


@pytest.mark.heavy
@needs_exporters
@pytest.mark.parametrize("format", FORMATS)
def test_both_towers_answer_as_the_dual_encoder(format, exported, folders):
    graphs = load_exported(exported("retrieval", format), trust_remote_code=True).runners
    model = UMTVideoTextForRetrieval.from_pretrained(folders["retrieval"]).eval()
    patch = model.config.vision_config.patch_size
    towers = export.load_graphs(folders["retrieval"], "model")[0]
    check_shapes(graphs["video"], towers["video"], patch, list_shapes(format))
    for batch, length in ((2, 4), (1, 1), (3, 7), (5, 2)):
        ids = torch.randint(104, model.config.text_config.vocab_size, (batch, length))
        mask = torch.ones_like(ids)
        mask[batch // 2 :, (length + 1) // 2 :] = 0
        with torch.no_grad():
            expected = model.get_text_features(ids, mask)
        found = graphs["text"](input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
@needs_exporters
@pytest.mark.parametrize("format", FORMATS)
def test_scores_of_files_are_the_dual_encoders(format, exported, folders, tmp_path):
    videos = [str(write_video(tmp_path / f"{i}.mp4", num_frames=10 + i)) for i in range(2)]
    texts = ["a red circle", "a green circle moving"]
    encoder = VideoTextEncoder(folders["retrieval"])
    model = ExportedVideoModel.from_pretrained(exported("retrieval", format), trust_remote_code=True)
    inputs = encoder.processor(text=texts, videos=videos, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**inputs).logits_per_video
    torch.testing.assert_close(model.compare(videos, texts), expected, atol=1e-4, rtol=1e-4)
    assert model.encode_texts("a red circle").shape == (1, encoder.model.config.projection_dim)


@pytest.mark.heavy
@needs_exporters
def test_one_tower_alone_and_the_encoder_of_any_folder(folders, tmp_path):
    require_format("torch")
    for part, names in (("video", {"video"}), ("text", {"text"}), ("encoder", {"model"})):
        report = export_model(folders["retrieval"], tmp_path / part, "torch", part)
        assert set(report.graphs) == names and report.largest_difference < 1e-5
    # A tower holds its own weights alone.
    tower = export.load_graphs(folders["retrieval"], "text")[0]["text"]
    assert isinstance(tower, Tower)
    names = {name.removeprefix("model.") for name, _ in tower.named_parameters()}
    assert not any("vision_model" in name or "layers.2." in name or "temperature" in name for name in names)
    export_model(folders["detector"], tmp_path / "detector", "torch", "encoder")


@needs_exporters
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_user_classifies_a_file_from_an_export(format, exported, folders, tmp_path):
    folder = exported("classifier", format)
    video = str(write_video(tmp_path / "video.mp4", num_frames=20))
    expected = VideoClassifier(folders["classifier"]).classify(video, 5, num_clips=2, num_crops=3)
    found = VideoClassifier(folder).classify(video, 5, num_clips=2, num_crops=3)
    assert [scored.label for scored in found] == [scored.label for scored in expected]
    np.testing.assert_allclose([s.probability for s in found], [s.probability for s in expected], atol=1e-6)
    outputs = ExportedVideoModel.from_pretrained(folder)(video, num_frames=5, size={"height": 48, "width": 48})
    assert outputs.logits.shape == (1, 5)
    result = CliRunner().invoke(
        cli.app, ["classify", video, "--model", str(folder), "--top-k", "5", "--num-workers", "0", "--json"]
    )
    assert result.exit_code == 0, result.output
    labels = [entry["label"] for entry in json.loads(result.stdout)["videos"][0]["labels"]]
    assert labels == [scored.label for scored in VideoClassifier(folders["classifier"]).classify(video)]
    # Results in a file are those of one export, as of one model.
    other = exported("attentive", format)
    fingerprints = {compute_fingerprint(VideoClassifier(path).model) for path in (folder, folder, other)}
    assert len(fingerprints) == 2


@needs_exporters
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_report_is_all_of_standard_output(format, folders, tmp_path):
    """A script reads it as JSON; what the exporters tell goes to standard error."""
    require_format(format)
    words = ["export", str(folders["classifier"]), "--format", format, "--int8", "--json"]
    command = [sys.executable, "-m", "umt_hf.cli", *words, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["is_int8"] is True


def load_twice_and_signal(folder):
    """Two graphs that are let go in the order they came, then a signal that Python handles."""
    signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
    first, second = load_exported(folder), load_exported(folder)
    del first
    gc.collect()
    del second
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)


@needs_exporters
def test_a_process_that_has_let_graphs_go_still_handles_signals(exported, tmp_path):
    require_format("openvino")
    folder = str(exported("classifier", "openvino"))
    process = start_process(load_twice_and_signal, folder, environment={}, output=tmp_path / "output")
    process.join(120)
    assert process.exitcode == 0 and read_output(tmp_path / "output").stdout.endswith("handled\n")


@needs_exporters
def test_plain_onnxruntime_reads_the_graph(exported, folders):
    folder = exported("classifier", "onnx")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    assert [put.name for put in session.get_inputs()] == ["pixel_values"]
    assert [put.name for put in session.get_outputs()] == ["logits"]
    video = np.random.default_rng(0).standard_normal((1, 5, 3, 48, 32), dtype=np.float32)
    (logits,) = session.run(None, {"pixel_values": video})
    module = export.load_graphs(folders["classifier"], "model")[0]["model"]
    with torch.no_grad():
        np.testing.assert_allclose(logits, module(torch.from_numpy(video)).logits, atol=1e-5)


@needs_exporters
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_weights_of_8_bits_answer_nearly_as_the_model(format, folders, tmp_path):
    try:
        require_exporters(export.TRANSFORMERS_FORMATS[format], int8=True)
    except ImportError as error:
        pytest.skip(str(error))
    report = export_model(folders["classifier"], tmp_path / "int8", format, int8=True)
    assert report.is_int8 and 1e-5 < report.largest_difference < 0.2
    full = export_model(folders["classifier"], tmp_path / "full", format)
    assert report.size_bytes < full.size_bytes
    model = VideoClassifier(tmp_path / "int8").model
    check = torch.randn(2, 5, 3, 48, 32)
    assert model(pixel_values=check).logits.shape == (2, 5)


@needs_exporters
def test_a_graph_that_answers_otherwise_is_not_kept(folders, tmp_path, monkeypatch):
    require_format("torch")
    monkeypatch.setattr(export, "compare", lambda *_: 0.5)
    result = CliRunner().invoke(
        cli.app, ["export", str(folders["classifier"]), "--format", "torch", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and "differs from the model by 5.0e-01" in result.output
    assert not list(tmp_path.iterdir())


@needs_exporters
def test_the_comparison_sees_what_is_wrong(folders):
    module = export.load_graphs(folders["classifier"], "model")[0]["model"]
    assert compare(module, module, "onnx") == 0

    def change(**changes):
        def run(**inputs):
            outputs = module(**inputs)
            outputs.logits = changes["logits"](outputs.logits, inputs["pixel_values"])
            return outputs

        return compare(run, module, "onnx")

    assert change(logits=lambda logits, _: logits[:, :3]) == float("inf")
    assert change(logits=lambda logits, _: logits * float("nan")) == float("inf")
    assert change(logits=lambda logits, video: logits + (video.shape[1] == 1)) > 0.1  # at one frame alone
    assert change(logits=lambda logits, video: logits + (video.shape[3] == 8)) > 0.1  # at one row of patches alone


@pytest.mark.heavy
@needs_exporters
def test_pickled_exports_want_to_be_trusted(folders, tmp_path):
    require_format("torch")
    export_model(folders["classifier"], tmp_path / "out", "torch")
    for load in (VideoClassifier, ExportedVideoModel.from_pretrained):
        with pytest.raises(ValueError, match="pickled and may run code .* trust_remote_code=True"):
            load(tmp_path / "out")


@pytest.mark.parametrize("place", [".", ".."])
def test_a_model_is_not_written_over(folders, tmp_path, place, monkeypatch):
    monkeypatch.setattr(export, "require_exporters", lambda *_: None)
    model = shutil.copytree(folders["classifier"], tmp_path / "models" / "model")
    before = sorted(model.iterdir())
    words = ["export", str(model), "--format", "torch", "--out", str(model / place), "--overwrite"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2 and "would be written over what it is made from" in result.output, result.output
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize("model_class,part", [(UMTVideoForVideoClassification, "model"), (UMTVideoModel, "encoder")])
def test_graphs_see_all_tokens(model_class, part, tmp_path):
    model = build_model(model_class)
    model.config.keep_ratio = 0.5
    folder = save(model, tmp_path / "half")
    with pytest.raises(ValueError, match=r"half has a keep_ratio below 1, .* keep_ratio=1, save it"):
        export.load_graphs(folder, part)
    save(model_class.from_pretrained(folder, keep_ratio=1.0), tmp_path / "all")
    assert export.load_graphs(tmp_path / "all", part)[0]


class _Answers:
    """Stands for Transformers' `ExportedModel`: the graph is the model itself."""

    def __init__(self, folder):
        module = UMTVideoForVideoClassification.from_pretrained(folder).eval()
        self.components = self.runners = {"model": module}
        self.config = module.config


def test_files_are_labelled_by_an_export(folders, tmp_path, monkeypatch):
    """The command with --out, which asks more of a model than its answers; on the device that the runtime chooses."""
    model, clips = folders["classifier"], tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "a.mp4", 9, 32, 24)
    out = shutil.copytree(model, tmp_path / "out")
    (out / "export.json").write_text(json.dumps({"export_format": "onnx"}))
    facts = {"model_class": "UMTVideoForVideoClassification", "part": "model"}
    (out / "umt_export.json").write_text(json.dumps(facts))
    devices = []

    def load(folder, device=None, **_):
        devices.append(device)
        return _Answers(model)

    monkeypatch.setattr(export, "load_exported", load)
    words = ["classify", str(clips), "--out", str(tmp_path / "labels.jsonl"), "--model", str(out), "--json"]
    for done in (1, 0):  # the second time nothing is left to do
        result = CliRunner().invoke(cli.app, [*words, "--num-workers", "0"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["num_classified"] == done
    assert devices == [None, None]
    (line,) = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    expected = VideoClassifier(model).classify(str(clips / "a.mp4"))
    assert [label["label"] for label in line["labels"]] == [label.label for label in expected]


@needs_exporters
def test_folders_are_complete_or_as_they_were(folders, tmp_path, monkeypatch):
    require_format("torch")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder, or add --overwrite"):
        export_model(folders["classifier"], out, "torch")
    with pytest.raises(FileExistsError, match=r"holds something else, since it has no umt_export\.json"):
        export_model(folders["classifier"], out, "torch", overwrite=True)
    (out / "umt_export.json").write_text("{}")  # as of an earlier export
    monkeypatch.setattr(export, "write_text", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        export_model(folders["classifier"], out, "torch", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "notes.txt").read_text() == "mine"
    monkeypatch.undo()
    export_model(folders["classifier"], out, "torch", overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert {"model.pt2", "export.json", "config.json", "umt_export.json", "video_preprocessor_config.json"} <= names
    assert "notes.txt" not in names
    # An export is not a model for other commands, and says what it is.
    result = CliRunner().invoke(cli.app, ["features", "a.mp4", "--model", str(out), "--out", str(tmp_path / "f")])
    assert result.exit_code == 2 and "is an export" in result.output, result.output


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("detector", "model", "its video encoder can be: part encoder"),
        ("detector", "text", "no towers of a dual encoder"),
        ("classifier", "text", "no towers of a dual encoder"),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(kind, part, message, folders):
    with pytest.raises(ValueError, match=message):
        export.load_graphs(folders[kind], part)


def test_mistakes_are_named_before_a_model_is_loaded(tmp_path):
    for options, message in (
        ({"format": "tflite"}, "format must be one of"),
        ({"part": "head"}, "part must be one of"),
        ({"format": "torch", "int8": True}, "int8 goes with format onnx or openvino"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tmp_path / "missing", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="is not an export: it has no export.json"):
        load_exported(tmp_path)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)
    result = CliRunner().invoke(cli.app, ["export", "model", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert f"need Transformers {export.EXPORTERS_VERSION} or newer, got {transformers.__version__}" in words


@needs_exporters
def test_missing_libraries_name_the_extra(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"to onnx need onnx, onnxscript, onnxruntime: `pip install 'umt_hf\[export\]'`"
    ):
        require_exporters("onnx")
    with pytest.raises(ImportError, match="nncf"):
        require_exporters("openvino", int8=True)


def test_the_tiny_models_are_what_the_shapes_are_for():
    config = build_config(UMTVideoModel)
    assert (config.patch_size, config.image_size, config.num_frames) == (8, 32, 2)
