# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor of the UMT video-text models: videos to pixels, and captions, questions and answers to tokens."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import BatchEncoding, TextInput
from transformers.utils import TensorType
from transformers.video_utils import VideoInput

from .video_processing_umt_video import UMTVideoProcessor, UMTVideoProcessorKwargs

SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
DROPPED_CHARACTERS = str.maketrans("", "", ",.'!?\"()*#:;~")


# Defaults in code, since a processor that is built without a folder has to pad and cut like the published one too.
# trf-ignore: TRF019
class UMTVideoTextProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `UMTVideoTextProcessor`, for texts and for videos."""

    # pyrefly: ignore[bad-override-mutable-attribute]  how a processor names its kind of video arguments
    videos_kwargs: UMTVideoProcessorKwargs
    # pyrefly: ignore[bad-class-definition]  how every processor gives its defaults
    _defaults = {"text_kwargs": {"padding": "max_length", "truncation": True}}


class UMTVideoTextProcessor(ProcessorMixin):
    r"""Turn videos and texts into the inputs of the UMT video-text models.

    Texts become `[CLS]` and word pieces *without* `[SEP]`, cut to the tokenizer's `model_max_length` or the call's
    `max_length`, and padded to it (`padding="max_length"`, the default) or to the longest of the batch
    (`padding=True`). An image is a video of one frame: `videos=[[image]], do_sample_frames=False`.

    Args:
        video_processor: [`UMTVideoProcessor`].
        tokenizer: A tokenizer that adds `[CLS]` alone: see `build_tokenizer`.
        clean_text: Whether texts are cleaned as for the published models; see `clean_caption`.

    Raises:
        ValueError: If the tokenizer ends a text with `[SEP]`.

    Examples:
        >>> from umt_hf import UMTVideoProcessor, UMTVideoTextProcessor
        >>> from umt_hf.processing.processing_umt_video_text import build_tokenizer
        >>> video_processor = UMTVideoProcessor(num_frames=4)
        >>> tokenizer = build_tokenizer("vocab.txt")
        >>> processor = UMTVideoTextProcessor(video_processor, tokenizer)
        >>> inputs = processor(
        ...     ["A red circle."], videos=["video.mp4"], return_tensors="pt"
        ... )
        >>> inputs["input_ids"].shape, inputs["pixel_values"].shape
        (torch.Size([1, 32]), torch.Size([1, 4, 3, 224, 224]))
    """

    valid_processor_kwargs = UMTVideoTextProcessorKwargs

    def __init__(
        self, video_processor: UMTVideoProcessor, tokenizer: PreTrainedTokenizerFast, clean_text: bool = True
    ):
        self.clean_text = clean_text
        super().__init__(video_processor, tokenizer)
        if tokenizer.sep_token_id in tokenizer("").input_ids:
            raise ValueError(
                f"{type(tokenizer).__name__} ends every text with {tokenizer.sep_token}, which no UMT model has seen; "
                "make it with build_tokenizer."
            )

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        **kwargs: Unpack[UMTVideoTextProcessorKwargs],
    ) -> BatchFeature:
        """Process texts, videos or both.

        Args:
            text: Caption or question, or a list of them.
            videos: What [`UMTVideoProcessor`] takes.
            **kwargs: Arguments of the tokenizer and of the video processor, and `return_tensors`.

        Returns:
            `input_ids` and `attention_mask` `(B, L)` for texts, `pixel_values (B, T, C, H, W)` for videos.

        Raises:
            ValueError: If there is nothing to process, or something else than text and videos.
        """
        if kwargs.get("images") is not None:
            raise ValueError("An image is a video of one frame: pass videos=[[image]] and do_sample_frames=False.")
        if text is None and videos is None:
            raise ValueError("Give text, videos or both.")
        merged = self._merge_kwargs(
            # pyrefly: ignore[bad-argument-type]  it takes the class, which its annotation leaves out
            UMTVideoTextProcessorKwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        data: dict[str, Any] = {}
        if text is not None:
            if self.clean_text:
                text = clean_caption(text) if isinstance(text, str) else [clean_caption(item) for item in text]
            data.update(self.tokenizer(text, **merged["text_kwargs"]))
        if videos is not None:
            data.update(self.video_processor(videos, **merged["videos_kwargs"]))
        return BatchFeature(data)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save video processor and tokenizer, as every processor does."""
        # A fast tokenizer writes down its last call's padding and length, which would come back as its defaults.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def encode_answers(
        self, answers: Sequence[str], max_length: int = 5, return_tensors: str | TensorType | None = None
    ) -> BatchEncoding:
        """Tokenize answers as the answer decoder reads and writes them: `[CLS] ... [SEP]`, not cleaned.

        Args:
            answers: Texts.
            max_length: Tokens per answer, `[CLS]` and `[SEP]` included; longer ones are cut.
            return_tensors: "pt", "np", or `None` for lists.

        Returns:
            `input_ids` and `attention_mask`, `(answers, max_length)`.
        """
        return self.tokenizer(
            [f"{answer} {self.tokenizer.sep_token}" for answer in answers],
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors=return_tensors,
        )


def clean_caption(text: str, max_words: int | None = None) -> str:
    r"""Clean a caption or question as the published models saw them.

    Lower case; `, . ' ! ? " ( ) * # : ; ~` go; hyphen and slash become a space; runs of white space become one space.

    Args:
        text: The text.
        max_words: Words to keep; default: all.

    Returns:
        The cleaned text.

    Examples:
        >>> from umt_hf.processing.processing_umt_video_text import clean_caption
        >>> clean_caption("A well-known dog/cat!")
        'a well known dog cat'
    """
    text = text.lower().translate(DROPPED_CHARACTERS)
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return text if max_words is None else " ".join(text.split(" ")[:max_words])


def build_tokenizer(source: str | os.PathLike | Sequence[str], max_length: int = 32) -> PreTrainedTokenizerFast:
    """Make the WordPiece tokenizer of the UMT models: BERT's, uncased, with `[CLS]` in front and no `[SEP]` behind.

    Args:
        source: A `vocab.txt` with one word piece per line, or the word pieces, in the order of their ids; or folder or
            Hub id of a BERT tokenizer.
        max_length: Tokens per text, `[CLS]` included (32 in stage 2, 25 for questions).

    Returns:
        The tokenizer.

    Raises:
        ValueError: If a special token is not in the vocabulary.

    Examples:
        >>> from umt_hf.processing.processing_umt_video_text import build_tokenizer
        >>> tokenizer = build_tokenizer("vocab.txt")
        >>> ids = tokenizer("a red circle").input_ids
        >>> tokenizer.convert_ids_to_tokens(ids)
        ['[CLS]', 'a', 'red', 'circle']
    """
    if isinstance(source, str | os.PathLike):
        backend = _build_backend(_read_words(source)) if Path(source).is_file() else _load_backend(source)
    else:
        backend = _build_backend(source)
    missing = [token for token in SPECIAL_TOKENS.values() if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"The vocabulary lacks {', '.join(missing)}.")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", backend.token_to_id("[CLS]"))]
    )
    backend.no_padding()
    backend.no_truncation()
    # Not a BertTokenizer, which adds [SEP] again whenever it is loaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def _read_words(path: str | os.PathLike) -> list[str]:
    return Path(path).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")  # a word may hold other line breaks


def _build_backend(words: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _load_backend(source: str | os.PathLike) -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


__all__ = ["UMTVideoTextProcessor", "build_tokenizer", "clean_caption"]
