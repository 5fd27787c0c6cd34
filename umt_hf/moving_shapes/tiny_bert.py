"""Make a tiny BERT for moving shapes: the text tower of the embedded default, since no weights ship.

`python -m umt_hf.moving_shapes.tiny_bert --data DIR --output_dir DIR` collects the words of captions, questions and
answers and saves a BERT with fresh weights and a tokenizer; stage 2 trains it.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import BertConfig, BertModel, set_seed

from ..processing.processing_umt_video_text import SPECIAL_TOKENS, build_tokenizer
from ..runs.arguments import NamedDataArguments, TowerSizeArguments
from ..runs.config import REQUIRED, describe, require, script, set_defaults

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
@set_defaults(data=REQUIRED, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
class TextTowerArguments(NamedDataArguments, TowerSizeArguments):
    """Folder written by moving_shapes, and sizes; the width is the video encoder's, so that answers can attend."""

    output_dir: str = field(metadata={"help": "Folder for the BERT and its tokenizer."})
    seed: int = describe(0, "Seed of the weights.")


SECTIONS = {"model": TextTowerArguments}


def write_text_tower(args: TextTowerArguments) -> None:
    """Save a BERT with fresh weights that knows the words of the data."""
    set_seed(args.seed)
    words = [*SPECIAL_TOKENS.values(), *collect_words(Path(require(args.data, "data")))]
    tokenizer = build_tokenizer(words)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    logger.info("Wrote %s: a BERT of %d words.", args.output_dir, len(words))


def collect_words(data: Path) -> list[str]:
    """Distinct words of a moving-shapes folder's captions, questions and answers, sorted.

    Raises:
        FileNotFoundError: If the folder is not a moving-shapes data set.
    """
    texts: list[str] = []
    for name in ("train_captions.json", "train_questions.json", "answers.json"):
        if not (data / name).is_file():
            raise FileNotFoundError(f"{data / name}: no moving shapes there; `umt-hf data moving-shapes {data}`.")
        texts.append((data / name).read_text(encoding="utf-8"))
    values = [value for text in texts for row in json.loads(text) for value in _list_texts(row)]
    return sorted({word for value in values for word in re.findall(r"\w+", value.lower())})


def _list_texts(row: str | dict[str, str]) -> list[str]:
    if isinstance(row, str):
        return [row]
    return [row[name] for name in ("caption", "question", "answer") if name in row]


@script(SECTIONS)
def main(args: TextTowerArguments) -> None:
    """Write the tower."""
    write_text_tower(args)


if __name__ == "__main__":
    main()
