"""The towers over two processes: tensor-parallel plans, sharded weights, and replicas with unused weights."""

import fnmatch
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn

from tests.processes import run_ranks
from umt_hf import (
    UMTTextConfig,
    UMTTextLMHeadModel,
    UMTTextModel,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

from .tiny_models import TEXT, build_inputs, build_model, list_features

SHARDED_CLASSES = (
    UMTVideoModel,
    UMTVideoForVideoClassification,
    UMTTextModel,
    UMTTextLMHeadModel,
    UMTVideoTextForRetrieval,
    UMTVideoTextForQuestionAnswering,
)


@pytest.mark.parametrize("model_class", [UMTTextModel, UMTTextLMHeadModel, UMTVideoTextModel])
def test_plans_name_layers_that_exist(model_class):
    """Each projection of attention and MLP is in the plan of its tower, and nothing else is."""
    model = build_model(model_class)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}
    linear = linear or {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    covered = {name for name in linear if any(fnmatch.fnmatch(name, pattern) for pattern in model._tp_plan)}
    assert covered == linear and linear
    assert set(model._tp_plan.values()) == {"colwise", "rowwise"}


def test_a_tower_without_fusion_layers_names_none():
    text = UMTTextConfig(**TEXT | {"fusion_layer": 4})
    assert not [name for name in text.base_model_tp_plan if "cross" in name]
    assert [name for name in UMTTextConfig(**TEXT).base_model_tp_plan if "cross" in name]
    assert "tp_plan" not in text.to_json_string()


@torch.no_grad()
def compute_sharded(folder: str) -> None:
    """Load each saved model over all processes, and compare with what one process computed."""
    for model_class in SHARDED_CLASSES:
        path = Path(folder) / model_class.__name__
        model = model_class.from_pretrained(path, tp_plan="auto").eval()
        sharded = 0
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "fc1")):
                weight = module.weight.to_local() if hasattr(module.weight, "to_local") else module.weight
                assert weight.shape[0] == {"q_proj": 32, "fc1": 64}[name.rsplit(".", 1)[1]], name
                sharded += 1
        assert sharded > 5
        outputs = list_features(model(**build_inputs(model_class)))
        expected = torch.load(path / "expected.pt")
        for name, feature in outputs.items():
            torch.testing.assert_close(feature, expected[name], atol=1e-5, rtol=1e-5)
    print("sharded features agree")


@pytest.mark.slow
def test_tensor_parallel_towers_agree_with_one_process(tmp_path):
    for model_class in SHARDED_CLASSES:
        model = build_model(model_class)
        model.save_pretrained(tmp_path / model_class.__name__)
        with torch.no_grad():
            expected = list_features(model(**build_inputs(model_class)))
        torch.save(expected, tmp_path / model_class.__name__ / "expected.pt")
    output = run_ranks(compute_sharded, str(tmp_path))
    assert output.stdout.count("sharded features agree") == 2


def train_replicas(find_unused: bool) -> None:
    """Two steps of the contrast alone, as a user's DDP loop makes them."""
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(
        build_model(UMTVideoTextModel).train(), find_unused_parameters=find_unused
    )
    inputs = build_inputs(UMTVideoTextModel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for _ in range(2):
            model(**inputs, return_loss=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print("two steps")
    except RuntimeError as error:
        assert "find_unused_parameters=True" in str(error)
        print("refused")
    torch.distributed.destroy_process_group()


def test_the_dual_encoder_alone_has_unused_layers_under_ddp():
    """Its docstring says so: the fusion layers are for matching, which the class does not do."""
    assert "find_unused_parameters=True" in UMTVideoTextModel.__doc__
    assert run_ranks(train_replicas, True).stdout.count("two steps") == 2
    assert run_ranks(train_replicas, False).stdout.count("refused") == 2


@torch.no_grad()
def grow_sharded_table() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = build_model(UMTVideoTextModel).vision_model
    clip = torch.randn(1, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = build_model(UMTVideoTextModel).vision_model(clip).last_hidden_state
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        torch.testing.assert_close(model(clip).last_hidden_state, expected)
        assert type(model.embeddings.sinusoid_table) is torch.Tensor
        assert model.embeddings.sinusoid_table.shape[1] == 96
    print("grown table agrees")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="PyTorch 2.6 shards on accelerators alone, not on a CPU"
)
def test_the_position_table_grows_beside_sharded_weights():
    assert run_ranks(grow_sharded_table).stdout.count("grown table agrees") == 2
