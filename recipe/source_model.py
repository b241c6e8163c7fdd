"""`model: from` in a run file: the architecture of the model that `from` names."""

from pathlib import Path
from typing import Any

from data.store.transfer import is_url
from data.tokenizer import corpus_tokenizer, padded
from flexbert.config import TOKEN_IDS, named_init
from flexbert_core.composing import load_node, merge
from flexbert_core.schema import ConfigError, expand_user, named
from recipe.hub import HUB, of_hub
from recipe.origin import named_origin

NAME = "from"


def source_folder(source: str) -> Path:
    """The folder that `from` names, or the local copy of a model of the hub. Raises ConfigError when that cannot be
    had."""
    return of_hub(source.removeprefix(HUB)) if source.startswith(HUB) else _local(source)


def _local(path: str) -> Path:
    """Of a text that no schema has seen yet. Raises ConfigError for what can be no path."""
    try:
        return Path(expand_user(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def from_source(node: dict[str, Any]) -> dict[str, Any]:
    """The run file's node with the fields of the source's model under those that `model: {preset: from, ...}` says.

    Its table has as many rows as the source's, or, where data.tokenizer has more tokens, as name each of them, up to a
    multiple of 64; ids of special tokens are left to the tokenizer. A run that has begun has the model that it
    recorded: it does not need the source any more. Raises ConfigError when there is no such source.
    """
    model = node.get("model")
    if not isinstance(model, dict) or model.get("preset") != NAME:
        return node
    own = {key: value for key, value in model.items() if key != "preset"}
    with named("runs"):
        run = _local(str(node.get("runs", "runs")))
    with named("name"):
        run /= _local(str(node.get("name")))
    recorded = run / "config.yaml"
    if recorded.is_file() and any((run / "checkpoints").glob("tokens-*")):
        return {**node, "model": merge(load_node(recorded)["model"], own, {"model.init": named_init}, ("model",))}
    origin = named_origin(node.get("from"))
    source = origin.get("checkpoint") if isinstance(origin, dict) else None
    if not isinstance(source, str):
        raise ConfigError("model: is `from`, and the file says no `from`: name a Hugging Face folder there")
    with named("from"):
        folder = source_folder(source)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: is `from`, and from: {source}: is no Hugging Face folder (no config.json in it): name an export, "
            f"or hf:ORG/NAME; a branch of a checkpoint says the model itself"
        )
    from flexbert.hf.convert import read_config  # late: transformers takes seconds

    with named("from"):
        fields = read_config(folder).model_dump(mode="json", by_alias=True)
    fields |= dict.fromkeys(TOKEN_IDS)
    fields["vocab_size"] = _rows(node, fields["vocab_size"])
    return {**node, "model": merge(fields, own, {"model.init": named_init}, ("model",))}


def _rows(node: dict[str, Any], theirs: int) -> int:
    """Of the token table. Where data.tokenizer is not there yet: the source's; the data are refused later."""
    data, tokens = node.get("data"), node.get("tokens")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(tokenizer, str) or is_url(tokenizer):
        return theirs
    with named("data.tokenizer"):
        folder = _local(tokenizer)
    if not (folder / "tokenizer.json").is_file():
        return theirs
    ids = 1 + max(corpus_tokenizer(folder).get_vocab(with_added_tokens=True).values())
    other = isinstance(tokens, dict) and tokens.get("other_tokenizer") is True
    return padded(ids) if other or ids > theirs else theirs
