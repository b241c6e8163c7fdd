"""`main.py demo`: the main job end to end on text that every install holds."""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexbert_core.schema import plain_console

SENTENCES = (
    "Permission is hereby granted, free of charge, to any person obtaining a [MASK] of this software.",
    "This program is distributed in the hope that it will be [MASK], but WITHOUT ANY WARRANTY.",
    "Return a new [MASK] containing the items of the list.",
    "import os\nimport [MASK]\n\nclass TestCase(unittest.TestCase):\n    def setUp(self):",
    "for i in [MASK](len(names)):\n    print(names[i])",
)


def run_demo() -> None:
    """Prepare, train, export and fill masks; every part resumes or is skipped when a run before has done it."""
    start, console = time.monotonic(), plain_console()
    root = Path(__file__).parent.parent
    console.rule("1/3 prepare: text of this machine to token shards")
    from data.preparation.dataset import load_prepare_config, prepare

    prepare(load_prepare_config(root / "configs" / "data" / "demo.yaml", []))

    console.rule("2/3 train: python main.py train configs/demo.yaml")
    from recipe.config import load_run_config
    from training import report
    from training.trainer import train

    config = load_run_config(root / "configs" / "demo.yaml")
    summary = train(config, console)

    console.rule("3/3 fill masks with the export, through transformers")
    fill_masks(summary["export"], console)
    report.closing_table(config, summary, console)
    console.print(f"the whole demo took {time.monotonic() - start:.0f} s this time")
    console.print(
        "next: .venv/bin/python main.py train configs/demo.yaml name=wider model.hidden_size=256 "
        "model.num_attention_heads=4\n  or: .venv/bin/python main.py inspect datasets/demo",
        soft_wrap=True,
    )


def fill_masks(export: str, console: Console) -> None:
    """Print the three likeliest fillings of five sentences, from `transformers.pipeline` alone."""
    from transformers import pipeline

    logging.getLogger("transformers").setLevel(logging.ERROR)
    fill = pipeline("fill-mask", model=export, top_k=3, device="cpu")
    table = Table("sentence", "filled with", show_lines=True)
    for sentence in SENTENCES:
        answers = [f"{answer['token_str']!r} {answer['score']:.0%}" for answer in fill(sentence)]
        table.add_row(Text(sentence), Text("\n".join(answers)))
    console.print(table)
