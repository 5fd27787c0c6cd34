"""The engine of all inference: one loader, its order, its time-outs, the precision, and where the time went."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import umt_hf
from umt_hf.data.in_flight import StuckReadingError
from umt_hf.inference import engine
from umt_hf.inference.engine import (
    choose_dtype,
    compile_model,
    in_model,
    inference_run,
    name_dtype,
    read_ahead,
    without_gradients,
)

PACKAGE = Path(umt_hf.__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Files(Dataset):
    """Contents of files; one that is a pipe without a writer never ends."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        return self.paths[row].read_bytes()


class Counting(IterableDataset):
    def __iter__(self):
        yield from range(5)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    paths = [tmp_path / f"video_{number}.mp4" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
    return paths


def test_inference_and_evaluation_have_one_loader():
    """A command that read by itself would know nothing of time-outs, of the order of batches and of its time."""
    places = [
        path.relative_to(PACKAGE).as_posix()
        for wing in ("inference", "evaluation")
        for path in sorted((PACKAGE / wing).rglob("*.py"))
        for _ in re.findall(r"(?:DataLoader|build_loader)\(", path.read_text(encoding="utf-8"))
    ]
    assert places == ["inference/engine.py"]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_the_order_of_the_plan(paths, num_workers):
    batches = [range(2), range(4, 5), range(2, 4)]
    found = list(read_ahead(Files(paths), batches, num_workers, videos=paths, collate_fn=b"".join))
    assert found == [b"01", b"4", b"23"]
    assert list(read_ahead(Counting(), None, min(num_workers, 1))) == [0, 1, 2, 3, 4]
    assert list(read_ahead(Files(paths), [], num_workers)) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_video_that_never_comes_is_named_after_the_time_out_of_the_run(paths):
    paths[3].unlink()
    os.mkfifo(paths[3])
    batches, names = [[row] for row in range(5)], [str(path) for path in paths]
    with inference_run(timeout_seconds=1), pytest.raises(StuckReadingError, match=re.escape(f"read: {paths[3]} ")):
        list(read_ahead(Files(paths), batches, 2, videos=names, collate_fn=list))


def test_a_run_says_what_it_waited_for(paths):
    said = []
    with inference_run(said.append) as run:
        for _ in read_ahead(Files(paths), [range(2), range(2, 5)], 0, collate_fn=list):
            with in_model():
                time.sleep(0.02)
    assert run.model_seconds >= 0.04 and 0 < run.reading_seconds <= run.waiting_seconds
    (line,) = said
    shares = r"[\d.]+ s: \d+% waiting for data, \d+% in the model, \d+% other; "
    assert re.fullmatch(shares + r"decoding and processing took [\d.]+ s in this process\.", line), line
    run.num_workers = 2
    assert run.format().endswith("2 worker processes.")
    with inference_run() as outer:
        with inference_run() as inner, in_model():
            pass
        assert outer.model_seconds == inner.model_seconds > 0
    with pytest.raises(KeyError), inference_run(said.append):
        raise KeyError
    assert len(said) == 1  # an error has its message


def test_nothing_is_counted_outside_of_a_run(paths):
    assert list(read_ahead(Files(paths), [range(5)], 0, collate_fn=len)) == [5]
    with in_model():
        pass
    assert engine._run.get() is None


def test_models_run_in_inference_mode_in_a_run_alone():
    """A model that is being trained must not keep a tensor of inference mode."""
    with without_gradients(CPU):
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with inference_run(), without_gradients(CPU):
        assert torch.is_inference_mode_enabled()
    with without_gradients(CPU, is_standalone=True):
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_float32_may_use_tf32_on_a_gpu_in_a_run_alone():
    before = torch.get_float32_matmul_precision()
    for device, expected in ((GPU, "high"), (CPU, before)):
        with inference_run(), without_gradients(device):
            assert torch.get_float32_matmul_precision() == expected
        with without_gradients(device):
            assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_the_precision_is_that_of_the_device_unless_it_is_asked_for(monkeypatch):
    assert choose_dtype(None, CPU) == torch.float32
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=has_bfloat16, **_: answer)
        assert choose_dtype(None, GPU) == expected
        assert choose_dtype(None, GPU, mixed_precision="bf16") == torch.float32
    assert choose_dtype("float16", GPU) == torch.float16 and choose_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be one of \['float32', 'bfloat16', 'float16'\], got 'int8'"):
        choose_dtype("int8", CPU)
    assert name_dtype(torch.bfloat16) == "bfloat16"


def test_the_video_tower_is_compiled_and_weights_keep_their_names():
    model = torch.nn.Module()
    model.vision_model = torch.nn.Linear(2, 2)
    names, inputs = list(model.state_dict()), torch.ones(1, 2)
    expected = model.vision_model(inputs)
    compile_model(model, backend="eager")
    assert list(model.state_dict()) == names and model.vision_model._compiled_call_impl is not None
    torch.testing.assert_close(model.vision_model(inputs), expected, rtol=0, atol=0)
    compile_model(alone := torch.nn.Linear(2, 2), backend="eager")
    assert alone._compiled_call_impl is not None
