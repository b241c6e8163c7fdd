"""Checkpoints as modules of sentence-transformers, which PyLate takes, too. Only local files are read.

sentence-transformers makes a mean-pooling model of any folder, with a warning, asks the hub about it, and takes its
length from the config alone; so the modules are made here one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evals.classifiers import load_tokenizer, longest
from flexbert_core.schema import ConfigError, RunError

_LOCAL = {"local_files_only": True, "trust_remote_code": True}


def is_sentence_model(folder: Path) -> bool:
    """Whether the folder states its own pooling and length."""
    return (folder / "modules.json").is_file()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of fresh poolers and of tables that grow."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def transformer(folder: Path, max_length: int | None) -> Any:
    """The first module: tokens in, hidden states out. max_length: tokens of a text; None, or more than the model
    takes: as many as it takes.

    Raises ConfigError for a folder that transformers cannot load, RunError for one whose weights are not all there.
    """
    from sentence_transformers.models import Transformer
    from transformers import AutoModel

    class Whole(Transformer):
        """One that knows which weights were not there."""

        def _load_model(self, name: str, config: Any, cache_dir: Any, *_: Any, **options: Any) -> None:
            self.auto_model, about = AutoModel.from_pretrained(
                name, config=config, cache_dir=cache_dir, output_loading_info=True, **options
            )
            self.missing = [key for key in about["missing_keys"] if ".pooler." not in f".{key}"]

    most = longest(folder, load_tokenizer(folder))
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # a pooler is drawn from the global generator
            module = Whole(
                str(folder),
                max_seq_length=most if max_length is None else min(most, max_length),
                model_args=dict(_LOCAL),
                tokenizer_args=dict(_LOCAL),
                config_args=dict(_LOCAL),
            )
    except Exception as error:  # the loaders raise bare Exception among others
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: sentence-transformers cannot load it: {said}") from None
    if missing := module.missing:
        raise RunError(f"{folder}: {missing[0]} and {len(missing) - 1} more are not in its weights: it is not whole")
    return module
