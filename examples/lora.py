"""Fine-tune with LoRA: PEFT trains two small matrices per projection, and saves only these and the head.

    python examples/lora.py --model umt-vit-b16 --data my_videos --output_dir outputs/adapter

`my_videos/train` and `my_videos/validation` hold a folder of videos per class.
`umt_hf.finetuning.classification --mode lora` also merges the adapter into an ordinary classifier.
"""

import argparse

import torch
from datasets import Video, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoVideoProcessor, Trainer, TrainingArguments

from umt_hf import UMTVideoForVideoClassification


def main() -> None:
    """Train and save an adapter, load it again, print its accuracy on the validation videos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of stage 1.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    data = load_dataset("videofolder", data_dir=args.data).cast_column("video", Video(decode=False))
    id2label = dict(enumerate(data["train"].features["label"].names))
    processor = AutoVideoProcessor.from_pretrained(args.model)

    def read(rows: dict) -> dict:
        return {**processor([video["path"] for video in rows["video"]], return_tensors="pt"), "labels": rows["label"]}

    base = UMTVideoForVideoClassification.from_pretrained(args.model, id2label=id2label)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    model.print_trainable_parameters()
    training = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        remove_unused_columns=False,  # `read` needs the column with the video
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
    )
    Trainer(model, training, train_dataset=data["train"].with_transform(read)).train()
    model.save_pretrained(args.output_dir)

    base = UMTVideoForVideoClassification.from_pretrained(args.model, id2label=id2label)
    model = PeftModel.from_pretrained(base, args.output_dir).eval()
    held_out = data["validation"].with_transform(read)
    with torch.no_grad():
        is_right = [model(row["pixel_values"][None]).logits.argmax() == row["labels"] for row in held_out]
    print(f"accuracy {sum(is_right) / len(is_right):.3f}; adapter: {args.output_dir}")


if __name__ == "__main__":
    main()
