"""ModernBERT's config.json in the words of transformers 4 and of transformers 5, whichever is installed."""

import json
from pathlib import Path
from typing import Any

THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
PERIOD = "global_attn_every_n_layers"


def kinds(layers: int, period: int) -> list[str]:
    return ["full_attention" if layer % period == 0 else "sliding_attention" for layer in range(layers)]


def newer(node: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it: thetas by kind of layer, and the kind of each layer."""
    node = older(node)
    if PERIOD in node:
        node["layer_types"] = kinds(node["num_hidden_layers"], node.pop(PERIOD))
        node["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": node.pop(name)} for kind, name in THETAS.items()
        }
    return node


def older(node: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it; the least period that makes the layers' kinds."""
    node = dict(node)
    if "layer_types" in node:
        given, parameters = node.pop("layer_types"), node.pop("rope_parameters")
        node[PERIOD] = next(n for n in range(1, len(given) + 1) if kinds(len(given), n) == given)
        node |= {name: parameters[kind]["rope_theta"] for kind, name in THETAS.items()}
    return node


def rewrite(folder: Path, change: Any) -> None:
    """Change config.json by a function of its fields; fields that become ... are left out."""
    file = folder / "config.json"
    node = change(json.loads(file.read_text()))
    file.write_text(json.dumps({key: value for key, value in node.items() if value is not ...}))
