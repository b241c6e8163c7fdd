"""The peer of benchmarks.time_to_loss: transformers' Trainer as its run_mlm example sets it up.

`python -m benchmarks.trainer_peer CONFIG START OUTPUT --tokens 1000000 --lr 1e-3 --rows 8 --seed 0` trains the Hugging
Face folder START on the training documents of the run file CONFIG, and writes OUTPUT, a folder of the same kind, and
OUTPUT/facts.json: seconds of training, steps, the mean loss of the last tenth.

As in run_mlm: documents with their special tokens are concatenated and cut into rows of one length, which are shuffled
each epoch; 15 % of tokens are masked anew by its collator; AdamW, no weight decay, gradients clipped at 1, a learning
rate that falls linearly from the first step.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from benchmarks.arguments import count, parser_of
from data.feed.loader import open_streams, tokenizer_folder
from recipe.config import RunConfig, load_run_config


def documents(config: RunConfig) -> Iterator[np.ndarray]:
    """Token ids of every training document, with [CLS] and [SEP]."""
    for stream in open_streams(config.data, "train"):
        manifest = stream.manifest
        ends = np.array([manifest.cls_token_id]), np.array([manifest.sep_token_id])
        for shard in range(len(manifest.shards)):
            for index in range(len(stream.lengths(shard))):
                yield np.concatenate([ends[0], stream.document(shard, index), ends[1]])


def rows_of(config: RunConfig, length: int) -> list[dict[str, list[int]]]:
    """All text in one line, cut; the rest that fills no row is dropped, as run_mlm drops it."""
    line = np.concatenate(list(documents(config))).astype(np.int64)
    whole = line[: len(line) // length * length].reshape(-1, length)
    return [{"input_ids": row.tolist()} for row in whole]


def train(
    config: RunConfig, start: Path, output: Path, tokens: int, *, lr: float, rows: int, seed: int
) -> dict[str, Any]:
    """Rows, of which a step has `rows`, are as long as those of the config's first phase."""
    length = config.phases[0].max_seq_len
    assert length is not None
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(config.data))
    steps = tokens // (length * rows)
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(start),
        args=TrainingArguments(
            output_dir=str(output / "trainer"),
            per_device_train_batch_size=rows,
            learning_rate=lr,
            max_steps=steps,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=max(1, steps // 10),
        ),
        train_dataset=rows_of(config, length),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    trainer.save_model(str(output))
    tokenizer.save_pretrained(output)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    facts = {
        "seconds": seconds,
        "steps": steps,
        "loss": logged[-1],
        "tokens": tokens,
        "lr": lr,
        "rows": rows,
        "seed": seed,
    }
    (output / "facts.json").write_text(json.dumps(facts))
    return facts


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=count, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--rows", type=int, required=True, help="a step")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    config = load_run_config(given.config)
    options = {"lr": given.lr, "rows": given.rows, "seed": given.seed}
    print(json.dumps(train(config, given.start, given.output, given.tokens, **options)))


if __name__ == "__main__":
    main()
