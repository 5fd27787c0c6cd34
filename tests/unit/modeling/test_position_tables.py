"""The position table of longer clips is computed once and kept, in every state that a model can be in."""

import copy
import time

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from umt_hf import UMTVideoConfig, UMTVideoModel
from umt_hf.modeling import modeling_umt_video
from umt_hf.modeling.modeling_umt_video import UMTVideoEmbeddings, compute_sinusoid_table
from umt_hf.modeling.positions_umt_video import compute_resize_weights

from .tiny_models import STORED_TABLE, VISION

TABLE = "sinusoid_table"


@pytest.fixture
def model() -> UMTVideoModel:
    """With a fresh table, as stage 2 has it, for clips of two frames."""
    fields = VISION | {"position_embedding_frames": None, "position_embedding_image_size": None}
    return UMTVideoModel(UMTVideoConfig(**fields)).eval()


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(1, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Sizes of the tables that were computed."""
    sizes = []

    def compute(num_positions: int, *arguments) -> torch.Tensor:
        sizes.append(num_positions)
        return compute_sinusoid_table(num_positions, *arguments)

    monkeypatch.setattr(modeling_umt_video, "compute_sinusoid_table", compute)
    return sizes


@torch.no_grad()
def test_a_grown_table_is_computed_once(model, clip, computed):
    for _ in range(3):
        for frames in (6, 4, 2, 6):
            model(clip[:, :frames])
    assert computed == [96]
    model(torch.cat([clip, clip], dim=1))
    assert computed == [96, 192]
    assert torch.equal(model.embeddings.sinusoid_table, compute_sinusoid_table(192, 64))


@torch.no_grad()
def test_a_grown_table_equals_a_stored_one(model, clip):
    fields = VISION | {"num_frames": 6, "position_embedding_frames": None, "position_embedding_image_size": None}
    stored = UMTVideoModel(UMTVideoConfig(**fields)).eval()
    stored.load_state_dict(model.state_dict())
    expected = stored(clip).last_hidden_state
    for _ in range(2):
        assert torch.equal(model(clip).last_hidden_state, expected)


@torch.no_grad()
def test_a_grown_table_is_no_part_of_what_is_saved(model, clip, tmp_path):
    names = list(model.state_dict())
    expected = model(clip).last_hidden_state
    assert list(model.state_dict()) == names and TABLE not in "".join(names)
    model.save_pretrained(tmp_path)
    loaded = UMTVideoModel.from_pretrained(tmp_path)
    assert loaded.embeddings.sinusoid_table.shape[1] == 32
    assert torch.equal(loaded(clip).last_hidden_state, expected)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(model(clip).last_hidden_state, expected)


@torch.no_grad()
def test_a_grown_table_follows_copies_precision_and_device(model, clip, computed):
    expected = model(clip).last_hidden_state
    twin = copy.deepcopy(model)
    assert torch.equal(twin(clip).last_hidden_state, expected)
    twin.to(torch.bfloat16)
    assert twin.embeddings.sinusoid_table.dtype == torch.bfloat16
    assert twin(clip.bfloat16()).last_hidden_state.dtype == torch.bfloat16
    twin.to("meta")
    assert twin(clip.bfloat16().to("meta")).last_hidden_state.shape == expected.shape
    assert computed == [96]  # the copies brought theirs
    assert torch.equal(model(clip).last_hidden_state, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
def test_a_grown_table_is_on_the_gpu(model, clip):
    model.cuda()(clip.cuda())
    assert model.embeddings.sinusoid_table.is_cuda and model.embeddings.sinusoid_table.shape[1] == 96


def test_a_table_made_for_inference_serves_training(model, clip):
    with torch.inference_mode():
        model(clip)
    assert not model.embeddings.sinusoid_table.is_inference()
    model(clip).pooler_output.sum().backward()
    model._init_weights(model.embeddings)  # writes into the table


def test_no_stand_in_is_kept(model, clip):
    """A mode that only counts makes tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.empty(1, 6, 3, 32, 32))
    assert model.embeddings.sinusoid_table.shape[1] == 32
    assert model(clip).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_a_compiled_model_makes_its_table_within_the_graph(model, clip):
    expected = copy.deepcopy(model)(clip).last_hidden_state
    compiled = torch.compile(lambda video: model(video).last_hidden_state, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(clip), expected)
    assert model.embeddings.sinusoid_table.shape[1] == 32
    model(clip)  # grows it
    assert model.embeddings.sinusoid_table.shape[1] == 96
    torch.testing.assert_close(compiled(clip), expected)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="needs PyTorch 2.7 to know an export from a compiled call"
)
@pytest.mark.parametrize("kind", ["fresh", "interpolated", "learnable"])
@torch.no_grad()
def test_an_exported_model_takes_any_shape(kind, model, clip):
    if kind != "fresh":
        fields = VISION | STORED_TABLE | {"learnable_position_embedding": kind == "learnable"}
        model = UMTVideoModel(UMTVideoConfig(**fields)).eval()
    any_size = torch.export.Dim.AUTO
    dynamic = {"pixel_values": {0: any_size, 1: any_size, 3: any_size, 4: any_size}}
    example = torch.randn(2, 2, 3, 32, 32)
    exported = torch.export.export(model, (), {"pixel_values": example}, dynamic_shapes=dynamic).module()
    shapes = [(2, 2, 3, 32, 32), (1, 6, 3, 32, 32), (3, 4, 3, 48, 40), (2, 5, 3, 16, 64), (1, 1, 3, 32, 32)]
    for shape in (*shapes, (3, 1, 3, 48, 16)):
        video = torch.randn(shape)
        features = exported(pixel_values=video).last_hidden_state
        torch.testing.assert_close(features, model(video).last_hidden_state, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        AssertionError, match="Guard failed"
    ):  # one row of patches, which `torch.export` takes for fixed
        exported(pixel_values=torch.randn(1, 2, 3, 8, 32))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 14])
@pytest.mark.parametrize("new_size", [1, 2, 3, 7, 8, 14, 40])
def test_weights_of_an_exported_graph_resize_as_pytorch_does(size, new_size):
    """In double precision: in single precision it rounds as much as we do."""
    line = torch.randn(1, 5, size, generator=torch.Generator().manual_seed(0))
    exact = line.double()
    linear = F.interpolate(exact, size=new_size, mode="linear", align_corners=False).float()
    weights = compute_resize_weights(size, new_size, is_cubic=False)
    torch.testing.assert_close(line @ weights.T, linear, atol=1e-6, rtol=0)
    cubic = F.interpolate(exact[:, :, :, None].expand(-1, -1, -1, 3), size=(new_size, 3), mode="bicubic")[..., 1]
    weights = compute_resize_weights(size, new_size, is_cubic=True)
    torch.testing.assert_close(line @ weights.T, cubic.float(), atol=2.5e-6, rtol=0)
    if size == new_size:
        assert torch.equal(weights, torch.eye(size))


@pytest.mark.slow
@torch.no_grad()
def test_longer_clips_cost_what_their_pixels_cost():
    """Width of L/16, processor time of one thread; 2.1 x where the table is computed at each call."""
    fresh = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "position_embedding_frames": None,
        "position_embedding_image_size": None,
    }
    grown, stored = (UMTVideoEmbeddings(UMTVideoConfig(**fresh, num_frames=frames)).eval() for frames in (4, 32))
    video = torch.randn(1, 32, 3, 224, 224)
    seconds: dict[UMTVideoEmbeddings, list[float]] = {grown: [], stored: []}
    for _ in range(6):
        for embeddings, spent in seconds.items():
            start = time.process_time()
            embeddings(video)
            spent.append(time.process_time() - start)
    ratio = min(seconds[grown][1:]) / min(seconds[stored][1:])
    print(f"embeddings of 32 frames, table grown from 4 frames: {ratio:.2f} x those of a stored table")
    assert ratio < 1.5
