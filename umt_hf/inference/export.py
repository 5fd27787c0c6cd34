r"""Write a model as a graph for another runtime, with its processor beside it, and answer from such a folder.

    umt-hf export outputs/classifier --format onnx --out classifier_onnx
    umt-hf classify video.mp4 --model classifier_onnx

Graphs, runtimes and quantisation are those of `transformers.exporters`; what is here binds them to our processors,
leaves batch, frames and size open, and compares what was written with the model.

Legend: B batch, T frames, L tokens of a text, D projection width.
"""

import copy
import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import transformers
from torch import nn
from transformers.video_utils import VideoInput

from ..modeling.losses_umt import normalize_features
from ..modeling.modeling_umt_video import UMTVideoForVideoClassification
from ..modeling.modeling_umt_video_text import UMTVideoTextModel
from ..processing.video_processing_umt_video import split_videos
from ..runs.disk import clear_leftovers, name_unfinished, put_folder, remove_folder, require_replaceable, write_text
from ..runs.folder import EXPORT_FILE, collect_versions
from ..runs.mistakes import UserError, naming_full_disk
from ..runs.models import DUAL_ENCODERS
from .features import load_encoder
from .loading import load_complete_model, load_video_processor, load_video_text_processor
from .starts import locate_model, read_model_fields

ExportFormat = Literal["onnx", "openvino", "torch"]
ExportPart = Literal["model", "encoder", "video", "text"]

FACTS_FILE = "umt_export.json"
TRANSFORMERS_FORMATS = {"onnx": "onnx", "openvino": "openvino", "torch": "dynamo"}
_kept: list[Any] = []  # graphs that stay until the process ends
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "dynamo": ()}
GRAPH_SUFFIXES = (".onnx", ".data", ".xml", ".bin")
EXPORTERS_VERSION = "5.24"
TOLERANCE = 1e-3  # of the largest value that the model gives; usual are 1e-6 to 1e-5
TEXT_LENGTHS = ((2, 5), (1, 1), (3, 9))  # batch and tokens of texts that are compared
# Parts of a dual encoder: its method, and the modules that it uses.
TOWERS = {
    "video": ("get_video_features", ("vision_model", "video_norm", "video_projection")),
    "text": ("get_text_features", ("text_model", "text_projection")),
}


class ExportError(UserError):
    """A graph was written that does not answer as its model does."""


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote.

    Attributes:
        folder: Where.
        runtime: Whose format the graphs have.
        graphs: Their names: `model`, or `video` and `text`.
        is_int8: Whether the weights are integers of 8 bits.
        largest_difference: Between the graphs' outputs and the model's, over several shapes, as a share of the
            model's largest value.
        size_bytes: Of all files.
    """

    folder: str
    runtime: str
    graphs: tuple[str, ...]
    is_int8: bool
    largest_difference: float
    size_bytes: int

    def format(self) -> str:
        """Write it as lines for people."""
        kind = "int8, " if self.is_int8 else ""
        return (
            f"Wrote {self.folder}: {self.runtime}, {kind}{self.size_bytes / 2**20:.1f} MiB, {', '.join(self.graphs)}\n"
            f"Largest difference from the model: {self.largest_difference:.1e} of its largest value"
        )


def export_model(
    model: str | os.PathLike,
    out: str | os.PathLike,
    format: ExportFormat = "onnx",
    part: ExportPart = "model",
    int8: bool = False,
    overwrite: bool = False,
    announce: Callable[[str], object] | None = None,
) -> ExportReport:
    """Export a model: any number of videos or texts, of frames, and any size go through the graph.

    Args:
        model: Folder or Hub id of a UMT model with its processor.
        out: Folder to write; it is complete or absent.
        format: "onnx", "openvino" or "torch" (`torch.export`).
        part: "model": of a classifier the classifier, of stage 2 and retrieval both towers, each a graph, of stage 1
            the encoder; "encoder": the video encoder of any folder; "video" or "text": one tower.
        int8: Whether weights become integers of 8 bits.
        overwrite: Whether an export that exists is replaced.
        announce: Gets a line per graph.

    Returns:
        What was written, and how far it differs from the model.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced, or holds something other than an export.
        ImportError: If Transformers is too old or a library is missing.
        OSError: If there is no model, or no processor beside it.
        ValueError: If the model has no such part, or an argument makes no sense.
        ExportError: If what was written differs from the model.

    Examples:
        >>> from umt_hf.inference.export import export_model
        >>> report = export_model("umt-vit-b16-k400", "exported", format="onnx")
        >>> report.largest_difference < 1e-5
        True
    """
    folder = Path(out)
    _check_arguments(format, part, int8)
    require_exporters(TRANSFORMERS_FORMATS[format], int8)
    clear_leftovers(folder.parent, (glob.escape(folder.name),))
    require_replaceable(folder, overwrite, FACTS_FILE, [model])
    graphs, facts = load_graphs(model, part)
    processor = load_video_text_processor(model) if "text" in graphs else load_video_processor(model)
    unfinished = name_unfinished(folder)
    remove_folder(unfinished)
    unfinished.mkdir(parents=True)
    try:
        # Exporters and quantizers, when they load too, take standard output for what they tell; it is the result's.
        with naming_full_disk(folder), redirect_stdout(sys.stderr):
            difference = _write_graphs(graphs, unfinished, TRANSFORMERS_FORMATS[format], int8, announce)
            processor.save_pretrained(unfinished)
            facts |= {"part": part, "is_int8": int8, "largest_difference": difference, **collect_versions()}
            write_text(unfinished / FACTS_FILE, json.dumps(facts, indent=1) + "\n")
            put_folder(unfinished, folder)
    finally:
        remove_folder(unfinished)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportReport(str(folder), format, tuple(graphs), int8, difference, size)


def _check_arguments(format: str, part: str, int8: bool) -> None:
    for name, value, words in (("format", format, ExportFormat), ("part", part, ExportPart)):
        if value not in get_args(words):
            raise ValueError(f"{name} must be one of {list(get_args(words))}, got {value!r}.")
    if int8 and format == "torch":
        raise ValueError("int8 goes with format onnx or openvino, not torch.")


def require_exporters(format: str, int8: bool = False) -> None:
    """Refuse to go on without what an export of a kind needs.

    Args:
        format: Transformers' name of it.
        int8: Whether it is to be quantised.

    Raises:
        ImportError: If Transformers is too old, or a library is missing.
    """
    try:
        from transformers.exporters import ExportedModel  # noqa: F401  older ones have exporters alone
    except ImportError as error:
        raise ImportError(
            f"Exports need Transformers {EXPORTERS_VERSION} or newer, got {transformers.__version__}: "
            "`pip install -U transformers`."
        ) from error
    needed = (*PACKAGES[format], *(("nncf",) if int8 and format == "openvino" else ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(f"Exports to {format} need {', '.join(missing)}: `pip install 'umt_hf[export]'`.")


def load_graphs(model: str | os.PathLike, part: ExportPart) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Load what a part of a model consists of, each in evaluation mode, float32.

    Returns:
        Module by name of its graph, and what answers need beside the graphs.

    Raises:
        ValueError: If the model has no such part.
    """
    model = locate_model(model)
    fields = read_model_fields(model)
    name = next(iter(fields.get("architectures") or []), "")
    if part != "text" and (fields.get("vision_config") or fields).get("keep_ratio", 1) < 1:
        raise ValueError(
            f"{model} has a keep_ratio below 1, and the graphs of an export see all tokens: load the model with "
            "keep_ratio=1, save it to another folder, and export that."
        )
    facts: dict[str, Any] = {"model_class": name}
    if part == "encoder" or (part == "model" and name in ("UMTVideoModel", "UMTVideoForPreTraining")):
        return {"model": load_encoder(model)[0]}, facts
    if part == "model" and name == "UMTVideoForVideoClassification":
        return {"model": load_complete_model(UMTVideoForVideoClassification, model, dtype=torch.float32).eval()}, facts
    if name not in DUAL_ENCODERS:
        advice = "its video encoder can be: part encoder" if part == "model" else "it has no towers of a dual encoder"
        raise ValueError(f"{model} is a {name or 'model of an unknown class'}, which is not exported; {advice}.")
    both = load_complete_model(UMTVideoTextModel, model, dtype=torch.float32).eval()
    facts["temperature"] = both.temperature.item()
    wanted = ("video", "text") if part == "model" else (part,)
    return {tower: Tower(both, *TOWERS[tower]) for tower in wanted}, facts


class Tower(nn.Module):
    """One tower of a dual encoder, without the weights of the other.

    Args:
        model: Both.
        method: Of the model; what the tower computes.
        parts: Modules of the model that the method uses.
    """

    def __init__(self, model: UMTVideoTextModel, method: str, parts: Sequence[str]):
        super().__init__()
        self.config = model.config
        cut = copy.copy(model)
        cut._modules = {name: model._modules[name] for name in parts}
        cut._parameters = {}
        if "text_model" in parts:  # without the layers that look at a video
            text = copy.copy(cut.text_model)
            text._modules = text._modules | {"layers": text.layers[: text.config.fusion_layer]}
            cut._modules["text_model"] = text
        self.model, self.method = cut, method

    def forward(self, **inputs: torch.Tensor) -> Any:
        """What the method gives."""
        return getattr(self.model, self.method)(**inputs, return_dict=True)


def build_inputs(module: nn.Module, batch: int, length: int, height: int = 0, width: int = 0) -> dict[str, Any]:
    """Random inputs of a graph.

    Args:
        module: Of the graph.
        batch: Videos or texts.
        length: Tubelets or tokens.
        height: Patches; default: as many as the model was trained with.
        width: Likewise.
    """
    generator = torch.Generator().manual_seed(batch + 10 * length)
    config = cast("Any", module.config)
    if getattr(module, "method", None) == "get_text_features":
        ids = torch.randint(1, config.text_config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, (length + 1) // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}
    config = getattr(config, "vision_config", config)
    sides = [(side or config.image_size // config.patch_size) * config.patch_size for side in (height, width)]
    shape = (batch, length * config.tubelet_size, config.num_channels, *sides)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def list_compared_inputs(module: nn.Module, format: str) -> list[dict[str, Any]]:
    """Inputs of several shapes: as trained, one frame of two videos, more frames that are wide, one row of patches."""
    if getattr(module, "method", None) == "get_text_features":
        return [build_inputs(module, *shape) for shape in TEXT_LENGTHS]
    config = cast("Any", getattr(module.config, "vision_config", module.config))
    native = max(config.num_frames // config.tubelet_size, 1)
    shapes = [(1, native), (2, 1, 2, 2), (1, native + 1, 2, 3), (1, 2, 1, 2)]
    if format == "dynamo":  # refuses one row, column or tubelet of frames: it takes a size of one for fixed
        shapes = shapes[:-1] if config.tubelet_size == 1 else [shapes[0], shapes[2]]
    return [build_inputs(module, *shape) for shape in shapes]


def _write_graphs(
    graphs: dict[str, nn.Module],
    folder: Path,
    format: str,
    int8: bool,
    announce: Callable[[str], object] | None,
) -> float:
    """Export modules into a folder, and give the largest difference of its graphs from them."""
    from transformers.exporters import AutoHfExporter, ExportedModel

    components = {}
    for name, module in graphs.items():
        if announce is not None:
            announce(f"Exporting {name} ...")
        config = cast("Any", getattr(module.config, "vision_config", module.config))
        inputs = build_inputs(module, 2, max(config.num_frames // config.tubelet_size, 2))
        free = torch.export.Dim.AUTO
        axes = {key: {axis: free for axis in range(value.ndim) if axis != 2} for key, value in inputs.items()}
        options = {"export_format": format, "dynamic_shapes": axes}
        if int8:
            options["quantizer"] = build_quantizer(format)
        exporter = AutoHfExporter.from_config(options)
        components[name] = exporter.export(cast("Any", module), inputs, options).components["model"]
    config = next(iter(graphs.values())).config
    ExportedModel(components, format, config=cast("Any", config)).save_pretrained(folder)
    # Read back, so that what is compared is what users get.
    exported = load_exported(folder, trust_remote_code=True)
    difference = max(compare(exported.runners[name], module, format) for name, module in graphs.items())
    if not int8 and not difference < TOLERANCE:
        raise ExportError(
            f"The {format} graph differs from the model by {difference:.1e} of its largest value, more than "
            f"{TOLERANCE:.0e}: it was not kept. Try another format, or other versions of its libraries."
        )
    return difference


def build_quantizer(format: str) -> Any:
    """What makes a graph's weights integers of 8 bits.

    Args:
        format: Transformers' name of it.
    """
    from transformers import exporters

    if format == "onnx":
        return exporters.OnnxRuntimeQuantizer(exporters.OnnxRuntimeDynamicConfig(per_channel=True), None)
    return exporters.NNCFOpenVINOQuantizer(exporters.NNCFWeightCompressionConfig(), None)


@torch.inference_mode()
def compare(run: Callable[..., Any], module: nn.Module, format: str) -> float:
    """Largest difference between a graph and its module over inputs of several shapes.

    Args:
        run: The graph.
        module: What it was made from.
        format: Of the graph, by Transformers' name.

    Returns:
        Share of the module's largest value; infinite where an output has another shape or is not finite.
    """
    largest = 0.0
    for inputs in list_compared_inputs(module, format):
        expected, found = module(**inputs), run(**inputs)
        for name, value in expected.items():
            if not isinstance(value, torch.Tensor):
                continue
            other = found[name]
            if other.shape != value.shape or not bool(torch.isfinite(other).all()):
                return math.inf
            largest = max(largest, float((other - value).abs().max() / value.abs().max()))
    return largest


def is_export(name_or_path: str | os.PathLike) -> bool:
    """Whether a folder is one that `export_model` has written."""
    return (Path(name_or_path) / EXPORT_FILE).is_file() and (Path(name_or_path) / FACTS_FILE).is_file()


def load_exported(
    folder: str | os.PathLike, device: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Load the graphs of a folder into their runtime.

    Args:
        folder: Written by `export_model`.
        device: Where they run; default: the runtime's choice.
        trust_remote_code: Needed for format torch, whose files are pickled and may run code when they are loaded.
        **options: Of the runtime: `providers` and `session_options` of ONNX Runtime, `config` of OpenVINO.

    Returns:
        Transformers' `ExportedModel`.

    Raises:
        ImportError: If Transformers is too old, or the runtime is missing.
        ValueError: If the folder is not an export, or of format torch and not trusted.
    """
    path = Path(folder) / EXPORT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an export: it has no {EXPORT_FILE}. Write one with `umt-hf export`.")
    format = str(json.loads(path.read_text(encoding="utf-8")).get("export_format"))
    if format not in PACKAGES:
        raise ValueError(f"{folder} is an export to {format}, which is not read here: {', '.join(PACKAGES)} are.")
    if format == "dynamo" and not trust_remote_code:
        raise ValueError(
            f"{folder} is an export of format torch, whose files are pickled and may run code when they are loaded: "
            "`ExportedVideoModel.from_pretrained` takes it with trust_remote_code=True if you trust it; commands read "
            "exports to onnx and openvino."
        )
    require_exporters(format)
    from transformers.exporters import ExportedModel

    # As many threads as PyTorch has here: the runtimes take every core of the machine by themselves.
    if format == "onnx" and "session_options" not in options:
        import onnxruntime  # pyrefly: ignore[missing-import]  an extra that few environments have

        options["session_options"] = onnxruntime.SessionOptions()
        options["session_options"].intra_op_num_threads = torch.get_num_threads()
    if format == "openvino":
        # OpenVINO computes in bfloat16 on a CPU that knows it, 1 % beside the model, unless it is asked not to.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        options["config"] = exact | options.get("config", {})
        device = device or "cpu"
    exported = ExportedModel.from_pretrained(
        str(folder), device=device, trust_remote_code=trust_remote_code, **options
    )
    if format == "openvino":
        # The CPU plugin of 2026.4 gives the thread a stack for signals. Where graphs are let go in the order they came
        # in, it leaves one that is gone, and the next signal (Ctrl-C, a loader's worker that ends) kills the process.
        _kept.append(exported)
    return exported


class ExportedGraph(nn.Module):
    """An exported graph in the place of the model that it was made from.

    Args:
        exported: Transformers' `ExportedModel`.
        name: Of the graph.
        folder: It was read from.
    """

    def __init__(self, exported: Any, name: str = "model", folder: str | os.PathLike = ""):
        super().__init__()
        self.name_or_path = os.fspath(folder)
        if name not in exported.components:
            raise ValueError(f"This export has no {name}: it holds {', '.join(exported.components)}.")
        self.runner, self.config = exported.runners[name], exported.config
        self.device, self.dtype = self.runner.device, torch.float32

    def forward(self, pixel_values: torch.Tensor | None = None, **inputs: torch.Tensor) -> Any:
        """What the model gives for these inputs."""
        given = inputs if pixel_values is None else {"pixel_values": pixel_values, **inputs}
        return self.runner(**given)


def load_exported_classifier(folder: str | os.PathLike, device: str | torch.device | None = None) -> ExportedGraph:
    """The graph of an exported classifier, for what takes a classifier.

    Raises:
        ValueError: If the export is not one of a classifier, or of format torch.
    """
    facts = json.loads((Path(folder) / FACTS_FILE).read_text(encoding="utf-8"))
    if (facts.get("model_class"), facts.get("part")) != ("UMTVideoForVideoClassification", "model"):
        raise ValueError(
            f"{folder} is an export of the {facts.get('part')} of a {facts.get('model_class')}, not of a classifier: "
            "read it with ExportedVideoModel."
        )
    graph = ExportedGraph(load_exported(folder, None if device is None else str(device)), folder=folder)
    # Stands for the weights, by which `umt-hf classify --out` knows whether results are of the same model.
    digest = hashlib.blake2b(digest_size=32)
    for file in sorted(path for path in Path(folder).iterdir() if path.suffix in GRAPH_SUFFIXES):
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    graph.digest = nn.Buffer(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    return graph


class ExportedVideoModel:
    """A folder of `umt-hf export`: its graphs in their runtime, and the processor beside them.

    Classes of videos come from `VideoClassifier(folder)`, which takes such folders too.

    Args:
        folder: Written by `export_model`.
        device: Where the graphs run; default: the runtime's choice.
        trust_remote_code: Needed for format torch, whose files are pickled and may run code when they are loaded.
        **options: Of the runtime.

    Raises:
        ImportError: If Transformers is too old, or the runtime is missing.
        ValueError: If the folder is not an export, or of format torch and not trusted.

    Examples:
        >>> from umt_hf import ExportedVideoModel
        >>> from umt_hf.inference.export import export_model
        >>> report = export_model("umt-vit-b16-k400", "exported")
        >>> exported = ExportedVideoModel.from_pretrained("exported")
        >>> exported("video.mp4", num_frames=12).logits.shape
        torch.Size([1, 5])
    """

    def __init__(
        self, folder: str | os.PathLike, device: str | None = None, trust_remote_code: bool = False, **options: Any
    ):
        self.exported = load_exported(folder, device, trust_remote_code, **options)
        self.facts = json.loads((Path(folder) / FACTS_FILE).read_text(encoding="utf-8"))
        has_text = "text" in self.exported.components
        self.processor: Any = load_video_text_processor(folder) if has_text else load_video_processor(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> "ExportedVideoModel":
        """Load a folder; the same as the class itself."""
        return cls(folder, **options)

    @torch.inference_mode()
    def __call__(self, videos: VideoInput, **options: Any) -> Any:
        """Read videos and run the graph of videos on them.

        Args:
            videos: What the processor takes: path, URL, bytes, array, tensor or frames, or a list of them.
            **options: Of the processor, such as `num_frames` and `size`; any number and size.

        Returns:
            The output of the model, as `logits`, or `last_hidden_state` and `pooler_output`.
        """
        name = "video" if "video" in self.exported.components else "model"
        inputs = self.processor(videos=videos, return_tensors="pt", **options)
        return ExportedGraph(self.exported, name)(pixel_values=inputs["pixel_values"])

    @torch.inference_mode()
    def encode_videos(self, videos: VideoInput, **options: Any) -> torch.Tensor:
        """Vectors of videos, one view each, float32 `(B, D)`: their inner product with a text's is the score."""
        clips = [self(video, num_clips=1, num_crops=1, **options).pooler_output for video in split_videos(videos)]
        return torch.cat(clips)

    @torch.inference_mode()
    def encode_texts(self, texts: str | list[str]) -> torch.Tensor:
        """Unit vectors of texts, float32 `(B, D)`."""
        inputs = self.processor(text=[texts] if isinstance(texts, str) else texts, padding=True, return_tensors="pt")
        graph = ExportedGraph(self.exported, "text")
        return normalize_features(
            graph(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).pooler_output
        )

    def compare(self, videos: VideoInput, texts: str | list[str], **options: Any) -> torch.Tensor:
        """How well each text fits each video, float32 `(videos, texts)`: the model's `logits_per_video`."""
        return self.encode_videos(videos, **options) @ self.encode_texts(texts).T / self.facts["temperature"]


__all__ = ["ExportReport", "ExportedVideoModel", "export_model"]
