"""Quantised models say what the float model says, by every way of quantising that runs here, or refuse.

The figures in docs/precision.md are what `pytest tests/unit/modeling/test_quantized_loads.py -rP -k trained` prints.
"""

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from umt_hf import (
    UMTTextLMHeadModel,
    UMTTextModel,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

from .tiny_models import ALL_CLASSES, build_inputs, build_model, compute_relative_error, list_features

PROJECTION = "vision_model.embeddings.patch_embeddings.projection"
DUAL = {PROJECTION, "video_projection", "text_projection"}
ALIGNMENT = {"alignment_heads.0.dense", "alignment_heads.1.dense"}
# The layers that see pixels and those whose outputs users read, by class.
FIRST_AND_LAST: dict[type, set[str]] = {
    UMTVideoModel: {PROJECTION.removeprefix("vision_model.")},
    UMTVideoForPreTraining: {PROJECTION, *ALIGNMENT},
    UMTVideoForVideoClassification: {PROJECTION, "classifier"},
    UMTVideoForActionDetection: {PROJECTION, "classifier"},
    UMTVideoTextModel: DUAL,
    UMTVideoTextForRetrieval: {*DUAL, "matching_head"},
    UMTVideoTextForPreTraining: {*DUAL, "matching_head", "mlm_head.decoder", *ALIGNMENT},
    UMTVideoTextForQuestionAnswering: {PROJECTION, "answer_decoder.lm_head.decoder"},
    UMTTextModel: set(),
    UMTTextLMHeadModel: {"lm_head.decoder"},
}
FOUR_BITS = "bitsandbytes nf4"
FP8 = "torchao fp8 weight-only"  # keeps 3 bits after the first of each number
METHODS = ("bitsandbytes 8-bit", "torchao int8 weight-only", FP8, "torch.ao dynamic int8")


def build_quantization_config(method: str) -> Any:
    """Configuration for `from_pretrained`; skips the test where the library or the hardware is not there."""
    library = method.split()[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    if library == "bitsandbytes":
        if method == FOUR_BITS:
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization

    if method == "torchao int8 weight-only":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    if method == FP8:
        return TorchAoConfig(quantization.Float8WeightOnlyConfig())
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("dynamic fp8 needs a CUDA GPU of compute capability 8.9")
    return TorchAoConfig(quantization.Float8DynamicActivationFloat8WeightConfig())


def load_quantized(model_class: type, folder: Path, method: str) -> Any:
    if method == "torch.ao dynamic int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will be replaced by torchao
            return torch.ao.quantization.quantize_dynamic(model_class.from_pretrained(folder), {nn.Linear})
    config = build_quantization_config(method)
    device = "cuda" if method.endswith("fp8 dynamic") else "cpu"
    return model_class.from_pretrained(folder, quantization_config=config, device_map=device).eval()


def list_float_layers(model: nn.Module) -> set[str]:
    """Linear layers whose weight is a plain parameter of numbers."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


class Recorder(HfQuantizer):
    """Takes the way of every quantiser of Transformers, up to the names that it skips."""

    def __init__(self, own: list[str] | None):
        self.own, self.pre_quantized = own, False
        self.quantization_config = SimpleNamespace(quant_method="recorder")

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        self.patterns = self.get_modules_to_not_convert(model, self.own, model._keep_in_fp32_modules)

    def is_serializable(self) -> bool:
        return False

    is_trainable = False


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("own", [None, [], ["layers.0.mlp.fc1"]])
def test_quantisers_leave_first_and_last_layers(model_class, own):
    """Whatever names the caller gives."""
    model, recorder = build_model(model_class), Recorder(own)
    assert not set(model._keep_in_fp32_modules) and not model.is_quantized  # nothing changes in other loads
    recorder.preprocess_model(model)
    patterns = recorder.patterns
    assert model.is_quantized
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for suffix in ("", ".weight"):  # bitsandbytes asks for modules, torchao for parameters
        skipped = {name for name in linear if not should_convert_module(name + suffix, patterns)}
        assert skipped >= FIRST_AND_LAST[model_class]
        if own == []:
            assert skipped == FIRST_AND_LAST[model_class]
    assert len(linear) > 2 * len(skipped)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_first_and_last_layers_follow_the_precision_asked_for(model_class, tmp_path):
    """The list that quantisers read means float32 in a float16 load, for other models."""
    build_model(model_class).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        model = model_class.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for name, p in model.named_parameters() if name != "temperature"} == {dtype}
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in build_inputs(model_class).items()}
        with torch.no_grad():
            assert all(feature.isfinite().all() for feature in list_features(model(**inputs)).values())


@pytest.mark.parametrize("method", [*METHODS, "torchao fp8 dynamic"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
@torch.no_grad()
def test_quantised_features_stay_close(model_class, method, tmp_path):
    model, inputs = build_model(model_class), build_inputs(model_class)
    model.save_pretrained(tmp_path)
    quantized = load_quantized(model_class, tmp_path, method)
    assert list_float_layers(quantized) == FIRST_AND_LAST[model_class]
    expected = list_features(model(**inputs))
    outputs = list_features(quantized(**{name: tensor.to(quantized.device) for name, tensor in inputs.items()}))
    assert outputs.keys() == expected.keys()
    for name, feature in outputs.items():
        assert compute_relative_error(feature.cpu(), expected[name]) < (0.1 if "fp8" in method else 0.05), name


class StoredLinear(nn.Module):
    """Stands for a quantised layer: it keeps its weight in a form that only it can compute with."""

    def __init__(self, layer: nn.Linear, storage: str):
        super().__init__()
        weight = layer.weight.detach()
        self.scale = weight.abs().max() / 127
        stored = (weight / self.scale).round()
        self.seen: list[torch.dtype] = []
        if storage == "functions":  # as torch.ao's modules have them
            self.stored, self.kept_bias = stored, layer.bias.detach()
            self.weight, self.bias = lambda: self.stored, lambda: self.kept_bias
        else:
            self.weight = nn.Parameter(stored.to(getattr(torch, storage)), requires_grad=False)
            self.bias = layer.bias
        self.storage = storage

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.seen.append(states.dtype)
        is_function = self.storage == "functions"
        weight, bias = (self.stored, self.kept_bias) if is_function else (self.weight, self.bias)
        return F.linear(states, weight.float() * self.scale, bias)


@pytest.mark.parametrize("storage", ["int8", "float8_e4m3fn", "functions"])
@torch.no_grad()
def test_states_are_never_cast_to_a_storage_type(storage):
    """Whoever quantises all the same, by hand, gets the features: of patches, and of boxes."""
    model, inputs = build_model(UMTVideoForActionDetection), build_inputs(UMTVideoForActionDetection)
    expected, tokens = model(**inputs).logits, model.vision_model(inputs["pixel_values"]).last_hidden_state
    patches = model.vision_model.embeddings.patch_embeddings
    patches.projection, model.classifier = (StoredLinear(m, storage) for m in (patches.projection, model.classifier))
    logits = model(**inputs).logits
    assert {*patches.projection.seen, *model.classifier.seen} == {torch.float32}
    bound = 0.1 if storage == "float8_e4m3fn" else 0.05  # 3 bits of a number
    assert compute_relative_error(model.vision_model(inputs["pixel_values"]).last_hidden_state, tokens) < bound
    assert compute_relative_error(logits, expected) < bound


@pytest.mark.parametrize(
    "model_class,method",
    [
        (UMTVideoTextForRetrieval, "bitsandbytes 8-bit"),
        (UMTVideoTextForRetrieval, FOUR_BITS),
        # torchao 0.18 reads no file with a parameter of the model itself, such as our temperature and CLIP's.
        (UMTVideoForVideoClassification, "torchao int8 weight-only"),
    ],
)
@torch.no_grad()
def test_a_quantised_model_is_saved_and_loads_again(model_class, method, tmp_path):
    build_model(model_class).save_pretrained(tmp_path / "float")
    quantized = load_quantized(model_class, tmp_path / "float", method)
    quantized.save_pretrained(tmp_path / "quantized")
    again = model_class.from_pretrained(tmp_path / "quantized", device_map="cpu").eval()
    assert list_float_layers(again) == FIRST_AND_LAST[model_class]
    inputs = build_inputs(model_class)
    expected = list_features(quantized(**inputs))
    for name, feature in list_features(again(**inputs)).items():
        torch.testing.assert_close(feature, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "model_class,head", [(UMTVideoForVideoClassification, "classifier"), (UMTVideoTextForRetrieval, "matching_head")]
)
def test_qlora_trains_and_its_adapter_loads_again(model_class, head, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    build_model(model_class).save_pretrained(tmp_path / "float")
    base = load_quantized(model_class, tmp_path / "float", FOUR_BITS)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=[head], r=4)
    model = get_peft_model(prepare_model_for_kbit_training(base), lora).train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any(head in name for name in trained)
    inputs = build_inputs(model_class, batch_size=4)
    wanted = {"labels": torch.tensor([0, 1, 2, 3])} if head == "classifier" else {"return_loss": True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss = model(**inputs, **wanted).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(
        not torch.equal(now[name], before) for name, before in trained.items() if "lora_" in name or head in name
    )

    with torch.no_grad():
        expected = list_features(model.eval()(**inputs))
        model.save_pretrained(tmp_path / "adapter")
        base = load_quantized(model_class, tmp_path / "float", FOUR_BITS)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        for name, feature in list_features(loaded(**inputs)).items():
            torch.testing.assert_close(feature, expected[name], atol=1e-5, rtol=1e-5)


def render_clips(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy clips of a square that drifts: its colour channel and its quarter of the frame give twelve classes."""
    generator = torch.Generator().manual_seed(seed)
    clips = 0.3 * torch.randn(count, 2, 3, 32, 32, generator=generator)
    labels = torch.randint(12, (count,), generator=generator)
    starts = torch.randint(0, 6, (count, 2), generator=generator)
    for clip, label, start in zip(clips, labels.tolist(), starts.tolist(), strict=True):
        row, column = start[0] + 16 * (label % 4 // 2), start[1] + 16 * (label % 2)
        for time, frame in enumerate(clip):
            frame[label // 4, row + 2 * time : row + 2 * time + 8, column : column + 8] += 2
    return clips, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a classifier that was trained until it knows the clips: 4 bits cost random weights far more."""
    model = build_model(UMTVideoForVideoClassification, num_labels=12).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    clips, labels = render_clips(2048, seed=0)
    for step in range(320):
        rows = slice(32 * (step % 64), 32 * (step % 64) + 32)
        model(clips[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.eval().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, FOUR_BITS])
@torch.no_grad()
def test_a_trained_model_keeps_its_features(method, trained):
    """A bound for 4 bits needs a trained model; prints the figures of the guide."""
    model = UMTVideoForVideoClassification.from_pretrained(trained)
    quantized = load_quantized(UMTVideoForVideoClassification, trained, method)
    clips, labels = render_clips(128, seed=1)
    expected, outputs = model(clips), quantized(clips)
    accuracy, quantized_accuracy = ((o.logits.argmax(1) == labels).float().mean().item() for o in (expected, outputs))
    assert accuracy > 0.9  # it learned
    features, pooled = (m.vision_model(clips).pooler_output for m in (model, quantized))
    cosine = F.cosine_similarity(pooled, features).min().item()
    error = compute_relative_error(pooled, features)
    print(
        f"{method}: relative error {error:.4f}, least cosine {cosine:.4f}, {accuracy:.3f} -> {quantized_accuracy:.3f}"
    )
    assert cosine > 0.98 and quantized_accuracy > accuracy - 0.05
    assert error < (0.05 if method != FOUR_BITS else 0.2)
