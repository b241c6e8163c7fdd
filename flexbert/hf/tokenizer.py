"""The tokenizer of an export: read, and written so that transformers 4 and 5 load it and know the longest sequence."""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flexbert.config import TOKEN_IDS, FlexBertConfig
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)

_CONFIG = "tokenizer_config.json"


def load_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer, or that of a folder. Raises ConfigError when it cannot be loaded."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer, PretrainedConfig

    folder = Path(tokenizer).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"tokenizer: {tokenizer}: no such folder")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if _of_transformers_5(_read(folder / _CONFIG)):
                for file in folder.iterdir():
                    if file.is_file() and file.suffix != ".safetensors":
                        shutil.copy(file, scratch)
                _write(Path(scratch) / _CONFIG, _for_both(_read(folder / _CONFIG)))
                folder = Path(scratch)
            # Of an export with code of its own transformers 5 would look at the model's class first.
            is_ours = _read(folder / "config.json").get("model_type") == "flexbert"
            known = {"config": PretrainedConfig()} if is_ours else {}
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **known)
    except Exception as error:  # the loaders raise bare Exception among others
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"tokenizer: {tokenizer}: cannot be loaded: {said}") from None


def token_ids(config: FlexBertConfig, tokenizer: Any) -> dict[str, int | None]:
    """The ids for config.json. Raises ConfigError for a tokenizer with more entries than the model."""
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"vocab_size: {config.vocab_size} is less than the {len(tokenizer)} entries of the tokenizer: not its model"
        )
    ids: dict[str, int | None] = {}
    for name in TOKEN_IDS:
        ours, theirs = getattr(config, name), getattr(tokenizer, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            # The model itself uses none of these ids, so a finished run need not fail over them.
            log.warning("%s: %d in the model, %d in the tokenizer: exported as the tokenizer's", name, ours, theirs)
        ids[name] = ours if theirs is None else theirs
    for name, stand_in in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")):
        if ids[name] is None:
            ids[name] = ids[stand_in]
    return ids


def save_tokenizer(tokenizer: Any, config: FlexBertConfig, folder: Path) -> None:
    """Write the tokenizer's files for a model; the tokenizer itself stays as it is.

    They say the longest sequence, so that `truncation=True` and `padding="max_length"` act, and no token types where
    the model has fewer than two. What a call cut or padded to is forgotten. transformers 4 and 5 load them.
    """
    tokenizer.save_pretrained(folder)
    node = _for_both(_read(folder / _CONFIG))
    node["model_max_length"] = config.max_position_embeddings
    names = list(tokenizer.model_input_names)
    if config.embedding.model_dump().get("token_types", 0) < 2:
        names = [name for name in names if name != "token_type_ids"]
    node["model_input_names"] = names
    _write(folder / _CONFIG, node)
    file = folder / "tokenizer.json"
    node = _read(file)
    if node.get("truncation") is not None or node.get("padding") is not None:
        _write(file, {**node, "truncation": None, "padding": None})


def _of_transformers_5(node: dict[str, Any]) -> bool:
    return node.get("tokenizer_class") == "TokenizersBackend" or isinstance(node.get("extra_special_tokens"), list)


def _for_both(node: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that transformers 4 knows too."""
    node = dict(node)
    if node.get("tokenizer_class") == "TokenizersBackend":
        node["tokenizer_class"] = "PreTrainedTokenizerFast"
        node.pop("backend", None)
    if isinstance(node.get("extra_special_tokens"), list):
        node["additional_special_tokens"] = node.pop("extra_special_tokens")
    return node


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, node: dict[str, Any]) -> None:
    file.write_text(json.dumps(node, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
