"""Cleaning, tokens and answers against the published rules, and the processor around them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, AutoVideoProcessor, BertTokenizer, PreTrainedTokenizerFast

from tests.parity.multi_modality import load_table
from tests.unit.modeling.test_modeling_video_text import TINY
from umt_hf import UMTVideoProcessor, UMTVideoTextConfig, UMTVideoTextForPreTraining, UMTVideoTextProcessor
from umt_hf.processing.processing_umt_video_text import build_tokenizer, clean_caption

RULES = load_table("text_rules")
WORDS = RULES["tokenizer"]["vocab"]


def build_processor(max_length: int = 32, clean_text: bool = True) -> UMTVideoTextProcessor:
    video_processor = UMTVideoProcessor(
        num_frames=2, size={"height": 32, "width": 32}, do_center_crop=False, resample=3
    )
    return UMTVideoTextProcessor(video_processor, build_tokenizer(WORDS, max_length), clean_text)


@pytest.fixture
def processor() -> UMTVideoTextProcessor:
    return build_processor()


def check_published_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in RULES["tokenizer"]["rows"]:
        encoded = tokenizer(row["text"], padding="max_length", truncation=True, max_length=row["max_length"])
        assert encoded.input_ids == row["input_ids"], row["text"]
        assert encoded.attention_mask == row["attention_mask"]
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert tokenizer.tokenize(row["text"]) == row["tokens"]


@pytest.mark.parametrize("text,cleaned", RULES["pre_text"]["rows"])
def test_cleaning(text, cleaned):
    assert clean_caption(text) == cleaned


@pytest.mark.parametrize("text,max_words,cleaned", RULES["pre_text_max_l"]["rows"])
def test_cleaning_and_cutting(text, max_words, cleaned):
    assert clean_caption(text, max_words) == cleaned


def test_ids_are_the_published_ones_from_every_source(tmp_path):
    check_published_ids(build_tokenizer(WORDS))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    check_published_ids(build_tokenizer(tmp_path / "vocab.txt"))
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    assert bert("a man").input_ids[-1] == 102
    bert.save_pretrained(tmp_path / "bert")
    check_published_ids(build_tokenizer(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
        build_tokenizer([word for word in WORDS if word != "[MASK]"])


@pytest.mark.parametrize("with_model", [False, True])
def test_round_trip_through_the_auto_classes(with_model, processor, tmp_path):
    """Beside a model's config.json too, by whose type Transformers looks for a tokenizer."""
    processor = build_processor(max_length=9, clean_text=False)
    if with_model:
        UMTVideoTextForPreTraining(UMTVideoTextConfig(**TINY)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is UMTVideoTextProcessor
    assert loaded.tokenizer.model_max_length == 9 and not loaded.clean_text
    assert type(loaded.video_processor) is UMTVideoProcessor and loaded.video_processor.num_frames == 2
    check_published_ids(loaded.tokenizer)
    check_published_ids(AutoTokenizer.from_pretrained(tmp_path))
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is UMTVideoProcessor
    loaded.save_pretrained(tmp_path / "again")
    check_published_ids(AutoProcessor.from_pretrained(tmp_path / "again").tokenizer)
    assert loaded(text="A man.")["input_ids"] == processor(text="A man.")["input_ids"]


def test_padding_and_truncation(processor):
    texts = ["A man, playing guitar!", "a"]
    fixed = processor(text=texts, return_tensors="pt")
    assert fixed.input_ids.shape == fixed.attention_mask.shape == (2, 32)
    assert fixed.attention_mask.sum(1).tolist() == [5, 2]
    dynamic = processor(text=texts, padding=True, return_tensors="pt")
    assert torch.equal(dynamic.input_ids, fixed.input_ids[:, :5])
    short = processor(text=texts, max_length=3)
    assert short["input_ids"] == [[101, 1, 11], [101, 1, 0]]
    assert len(processor(text="a " * 100)["input_ids"]) == 32
    assert len(build_processor(max_length=7)(text="a " * 100)["input_ids"]) == 7


def test_cleaning_is_an_option(processor):
    cleaned = processor(text="man-man")["input_ids"]
    assert cleaned[:4] == [101, 11, 11, 0]
    raw = build_processor(clean_text=False)(text="man-man")["input_ids"]
    assert raw[:4] == [101, 11, 100, 11]  # the hyphen is a separate piece, unknown here


def test_texts_and_videos_together(processor):
    videos = [np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8) for _ in range(2)]
    batch = processor(text=["a man", "the"], videos=videos, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch.pixel_values.shape == (2, 2, 3, 32, 32)
    expected = processor.video_processor(videos, return_tensors="pt").pixel_values
    assert torch.equal(batch.pixel_values, expected)
    assert set(processor(videos=videos, return_tensors="pt")) == {"pixel_values"}
    assert processor(videos=videos, num_frames=3, return_tensors="pt").pixel_values.shape[1] == 3
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}


def test_images_are_videos_of_one_frame(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    batch = processor(videos=[[image], [np.array(image)]], do_sample_frames=False, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 1, 3, 32, 32)
    assert torch.equal(batch.pixel_values[0], batch.pixel_values[1])
    with pytest.raises(ValueError, match="text, videos or both"):
        processor()


def test_images_by_another_name_are_not_dropped(processor):
    with pytest.raises(ValueError, match=r"videos=\[\[image\]\]"):
        processor(text="a", images=Image.new("RGB", (8, 8)))


def test_answers_end_with_their_mark(processor):
    encoded = processor.encode_answers(["guitar", "Red.", "a a a a a"], return_tensors="pt")
    guitar = [row for row in RULES["tokenizer"]["rows"] if row["text"] == "guitar [SEP]" and row["max_length"] == 5][0]
    assert encoded.input_ids[0].tolist() == guitar["input_ids"]
    assert encoded.attention_mask[0].tolist() == guitar["attention_mask"]
    assert encoded.input_ids[1].tolist() == [*processor.tokenizer.encode("Red. [SEP]"), 0]  # not cleaned
    assert encoded.input_ids[2].tolist() == [101, 1, 1, 1, 1]
    assert processor.batch_decode(encoded.input_ids[:1], skip_special_tokens=True) == ["guitar"]
    assert processor.encode_answers(["guitar"], max_length=3)["input_ids"] == [guitar["input_ids"][:3]]


def test_a_call_leaves_no_trace_in_the_saved_processor(processor, tmp_path):
    processor.encode_answers(["a cat"], max_length=3)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.model_max_length == 32
    assert len(loaded(text="a red circle")["input_ids"]) == 32


def test_tokenizers_that_add_the_end_mark_are_refused():
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    with pytest.raises(ValueError, match="build_tokenizer"):
        UMTVideoTextProcessor(UMTVideoProcessor(), bert)


def test_inputs_fit_the_model(processor):
    fields = TINY | {"text_config": TINY["text_config"] | {"max_position_embeddings": 40}}
    model = UMTVideoTextForPreTraining(UMTVideoTextConfig(**fields)).eval()
    video = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    batch = processor(text=["a man", "the"], videos=[video, video[::-1].copy()], return_tensors="pt")
    assert model(**batch).logits_per_video.shape == (2, 2)


def test_settings_are_written_plainly(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "UMTVideoTextProcessor"
    assert settings["clean_text"] is True
