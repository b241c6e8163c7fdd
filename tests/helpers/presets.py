"""What is known of the presets: parameters as released, and sizes that make them small."""

from typing import Any

from flexbert import FlexBertConfig, build
from flexbert.config import PRESETS
from tests.helpers.models import scrambled

RELEASED = [
    ("modernbert-base", "modernbert", 149_655_232),
    ("modernbert-large", "modernbert", 395_881_664),
    ("bert-base", "bert", 109_514_298),
    ("bert-large", "bert", 335_174_458),
    ("roberta-base", "roberta", 124_697_433),
]


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    **{f"{name}_token_id": None for name in ("pad", "cls", "sep", "mask")},
}


PRESET_NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))


def small(preset: str) -> Any:
    node = FlexBertConfig.from_yaml(preset).to_dict() | SIZES
    node |= {"bos_token_id": None, "eos_token_id": None, "init": {"name": "default", "std": 0.2}}
    return scrambled(build(FlexBertConfig.from_dict(node)))
