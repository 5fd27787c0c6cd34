"""Remarks of libraries are left out one by one, for as long as a run lasts."""

import logging
import warnings

import datasets
import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from umt_hf import UMTTeacher
from umt_hf.runs.noise import IMPORT_REMARKS, MANY_ROWS, quiet_libraries, show_bar


def collect_states() -> tuple:
    loggers = [logging.getLogger(name) for name in ("", "accelerate", "accelerate.utils.other")]
    filters = [len(own.filters) for logger in loggers for own in (logger, *logger.handlers)]
    levels = [logger.level for logger in loggers]
    bars = (transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
    return filters, levels, bars, transformers_logging.get_verbosity(), datasets.logging.get_verbosity()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_is_as_before_after_a_run(rank):
    before = collect_states()
    with pytest.raises(ValueError, match="mine"), quiet_libraries(rank):
        assert collect_states() != before
        raise ValueError("mine")
    assert collect_states() == before


def test_other_warnings_are_shown():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("a library's plan", FutureWarning, stacklevel=1)
            warnings.warn("This DataLoader will create 9 worker processes", UserWarning, stacklevel=1)
            warnings.warn("your data are odd", UserWarning, stacklevel=1)
    assert [str(own.message) for own in caught] == ["your data are odd"]


@pytest.mark.parametrize(
    "name,level,is_said",
    [("umt_hf.runs", "WARNING", False), ("umt_hf.runs", "ERROR", True), ("umt_hf.data.unreadable", "WARNING", True)],
)
def test_other_processes_say_what_they_alone_know(name, level, is_said, caplog):
    handlers = logging.getLogger().handlers
    record = logging.LogRecord(name, getattr(logging, level), "", 0, "message", (), None)
    with quiet_libraries(0):
        assert all(handler.filter(record) for handler in handlers)
    with quiet_libraries(1):
        assert {bool(handler.filter(record)) for handler in handlers} == {is_said}


@pytest.mark.parametrize("name,part", IMPORT_REMARKS.items())
def test_only_the_remark_is_left_out(name, part):
    def is_said(message: str) -> bool:
        return bool(logging.getLogger(name).filter(logging.LogRecord(name, logging.WARNING, "", 0, message, (), None)))

    assert not is_said(f"<enum> {part} ...") and is_said("something else")


def test_tables_of_many_rows_have_a_bar():
    with quiet_libraries():
        for num_rows, rank, is_shown in ((3, 0, False), (MANY_ROWS, 0, True), (MANY_ROWS, 1, False)):
            with show_bar(num_rows, rank):
                assert datasets.are_progress_bars_disabled() is not is_shown
            assert datasets.are_progress_bars_disabled()


@pytest.fixture
def clip(tmp_path):
    """A complete CLIP, whose text tower a teacher does not need."""
    tower = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 16, "projection_dim": 12},
        text_config={**tower, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8},
        projection_dim=12,
    )
    return CLIPModel(config)


def test_a_teacher_says_nothing_of_the_text_tower(clip, tmp_path, caplog):
    clip.save_pretrained(tmp_path)
    UMTTeacher.from_pretrained(str(tmp_path), num_aligned_layers=1)
    assert "LOAD REPORT" not in caplog.text


def test_a_teacher_names_weights_that_it_lacks_or_does_not_know(clip, tmp_path, caplog):
    clip.save_pretrained(tmp_path, state_dict={**clip.state_dict(), "vision_model.surprise": torch.zeros(1)})
    UMTTeacher.from_pretrained(str(tmp_path), num_aligned_layers=1)
    assert "vision_model.surprise" in caplog.text
    state = {name: own for name, own in clip.state_dict().items() if name != "visual_projection.weight"}
    clip.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks visual_projection\.weight"):
        UMTTeacher.from_pretrained(str(tmp_path), num_aligned_layers=1)


@pytest.mark.parametrize("name", ["httpx", "httpx2", "huggingface_hub.utils._http"])
def test_requests_are_not_lines_of_a_script(name, caplog):
    logger = logging.getLogger(name)
    caplog.set_level(logging.INFO)
    with quiet_libraries():
        logger.info("HTTP Request: HEAD http://127.0.0.1/")
        logger.warning("a warning")
    assert caplog.messages == ["a warning"] and logger.level == logging.NOTSET
