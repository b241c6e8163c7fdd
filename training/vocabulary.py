"""Whether a run's model and its streams' tokenizer fit each other."""

from collections.abc import Sequence
from pathlib import Path

from data.feed.loader import tokenizer_folder
from data.store.shards import Stream
from data.tokenizer import corpus_tokenizer, padded
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig


def check_vocabulary(config: RunConfig, streams: Sequence[Stream], theirs: int | None) -> None:
    """Raise ConfigError, a line for each fault, when the model's table or special ids are not the streams' tokenizer's.

    The model may have as few rows as name every id (30522 of BERT's), or as many as the streams say (padded to a
    multiple of 64). theirs: rows of the model that it starts from, which it may have, or have padded, even where they
    are more. What is no special token in the streams is never looked at, so spare rows are neither input nor target.
    """
    manifest, ours = streams[0].manifest, config.model.vocab_size
    named = 1 + max(_ids(tokenizer_folder(config.data)))
    most = max(manifest.vocab_size, padded(theirs or 0))
    faults = []
    if not max(named, theirs or 0) <= ours <= most:
        if named > ours:
            why = f"the streams' tokenizer has ids up to {named - 1}"
        elif theirs is not None:
            why = f"the model that `from` names has {theirs} rows, the streams' tokenizer {named} ids"
        else:
            why = f"the streams' tokenizer has {manifest.vocab_size}"
        faults.append(f"model.vocab_size: is {ours}, {why}: set model.vocab_size={most}")
    wrong = {
        key: (given, wanted)
        for key in ("cls_token_id", "sep_token_id", "mask_token_id", "pad_token_id")
        if (given := getattr(config.model, key)) is not None and given != (wanted := getattr(manifest, key))
    }
    if wrong:
        said = ", ".join(f"model.{key} is {given}, in the streams {wanted}" for key, (given, wanted) in wrong.items())
        fix = " ".join(f"model.{key}=null" for key in wrong)
        faults.append(f"{said}: set {fix} (null: the tokenizer's)")
    if faults:
        raise ConfigError("\n".join(faults))


def _ids(tokenizer: Path) -> set[int]:
    """Those that name a token."""
    if not (tokenizer / "tokenizer.json").is_file():
        raise ConfigError(f"data.tokenizer: {tokenizer}: holds no tokenizer.json")
    return set(corpus_tokenizer(tokenizer).get_vocab(with_added_tokens=True).values())
