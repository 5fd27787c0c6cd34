"""Makes our classes look to Transformers' common tests as if they shipped inside Transformers."""

from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from .transformers_sdist import list_marks

# The tests distinguish base models and heads by class name in these tables of Transformers.
# `AutoModel.register` keeps classes from outside elsewhere.
CLASS_NAMES = {
    "MODEL_MAPPING_NAMES": {"umt_video": "UMTVideoModel"},
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": {"umt_video": "UMTVideoForPreTraining"},
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES": {"umt_video": "UMTVideoForVideoClassification"},
}


def pytest_configure(config: pytest.Config) -> None:
    for name in sorted(list_marks()):
        config.addinivalue_line("markers", f"{name}: set by Transformers' common tests")


@pytest.fixture(autouse=True)
def list_our_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter our classes in Transformers' tables of names for the time of one test."""
    for table, names in CLASS_NAMES.items():
        for model_type, class_name in names.items():
            monkeypatch.setitem(getattr(modeling_auto, table), model_type, class_name)


def pytest_collection_modifyitems(items):
    """Some of these tests look for warnings, which the suite hides elsewhere."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default::FutureWarning"))
