"""Fine-tune an encoder on your own classes with the `Trainer` of Transformers.

    python examples/finetune_folder.py --model umt-vit-b16 --data my_videos --output_dir outputs/mine

`my_videos/train` and `my_videos/validation` hold a folder of videos per class. `classify_video.py` loads the result.
"""

import argparse

from datasets import Video, load_dataset
from transformers import AutoVideoProcessor, EvalPrediction, Trainer, TrainingArguments

from umt_hf import UMTVideoForVideoClassification


def main() -> None:
    """Train and save; print the accuracy on the validation videos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of stage 1, or of a classifier.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()

    data = load_dataset("videofolder", data_dir=args.data).cast_column("video", Video(decode=False))
    id2label = dict(enumerate(data["train"].features["label"].names))
    processor = AutoVideoProcessor.from_pretrained(args.model)
    model = UMTVideoForVideoClassification.from_pretrained(
        args.model, id2label=id2label, label2id={name: i for i, name in id2label.items()}, ignore_mismatched_sizes=True
    )

    def read(rows: dict) -> dict:
        return {**processor([video["path"] for video in rows["video"]], return_tensors="pt"), "labels": rows["label"]}

    def compute_accuracy(found: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(axis=1) == found.label_ids).mean())}

    training = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        remove_unused_columns=False,  # `read` needs the column with the video
        report_to="none",
    )
    train, held_out = data["train"].with_transform(read), data["validation"].with_transform(read)
    trainer = Trainer(model, training, None, train, held_out, processor, compute_metrics=compute_accuracy)
    trainer.train()
    trainer.save_model()  # with the processor
    trainer.save_state()  # with the losses
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}; model: {args.output_dir}")


if __name__ == "__main__":
    main()
