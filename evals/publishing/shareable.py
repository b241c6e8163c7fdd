"""A run's config without what is nobody's business: where things lie, who trains, and any key to something."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel

from flexbert_core.schema import MAY_CHANGE
from recipe.config import RunConfig

_SECRET = re.compile("tokens?$|secret|passw|credential|key$", re.IGNORECASE)  # of texts: counts of tokens are numbers
_HEAD = """# How this model was trained, as FlexBERT's run file has it. Paths, machines and loggers are left out:
# put your own in the place of PATH/TO/...
"""


def training_config(config: RunConfig) -> str:
    """YAML that is a run file again. It holds the keys that decide what is trained and measured, and no others: what
    MAY_CHANGE is where things lie, speed or logs."""
    node = _kept(config)
    data = node.setdefault("data", {})
    data["tokenizer"] = "PATH/TO/tokenizer"
    for name, stream in data["streams"].items():
        stream["path"] = f"PATH/TO/{name}"
    if config.origin is not None:
        node["from"] = {**node.get("from", {}), "checkpoint": public_name(config.origin.checkpoint)}
    node = {"name": config.name, **node}
    return _HEAD + yaml.safe_dump(node, sort_keys=False, allow_unicode=True, width=100)


def public_name(path: str) -> str:
    """A path or URL as it may be told: its last two names."""
    return "/".join([part for part in PurePosixPath(path.rpartition("://")[2]).parts if part not in ("/", "~")][-2:])


def _kept(node: Any, key: str = "") -> Any:
    if isinstance(node, BaseModel):
        fields = type(node).model_fields.items()
        kept = [(name, field) for name, field in fields if field.json_schema_extra != MAY_CHANGE]
        values = [(field.alias or name, getattr(node, name), field.default) for name, field in kept]
        return {key: _kept(value, key) for key, value, default in values if value is not None or default is not None}
    if isinstance(node, Mapping):
        return {str(name): _kept(value, str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_kept(value, key) for value in node]
    if isinstance(node, bool | int | float) or node is None:
        return node
    text = str(node)
    if _SECRET.search(key):
        return "REMOVED"
    return public_name(text) if "://" in text or text.startswith(("/", "~")) else text
