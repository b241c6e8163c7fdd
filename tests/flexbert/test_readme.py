"""The README's tables of presets and slots are what the code says. A failure prints the table to paste."""

import re
from pathlib import Path

from flexbert import FlexBertConfig
from flexbert.accounting import count_parameters
from flexbert.config import PRESETS
from flexbert.hf import _hf_config
from flexbert.registry import SLOTS

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
POSITIONS = {"learned": "learned", "alibi": "ALiBi", "sinusoidal": "sinusoids"}


def preset_row(file: Path) -> str:
    config = FlexBertConfig.from_yaml(file)
    source = re.search(r"arXiv (\d+\.\d+)", file.read_text())
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {config.num_attention_heads}"
    position = POSITIONS.get(config.position.name, f"RoPE {config.position.model_dump().get('layout', '')}".strip())
    mlp = f"{config.mlp.activation} {config.mlp.name} {config.intermediate_size}"
    _, mapping = _hf_config(config, {"pad_token_id": config.pad_token_id})
    loads_as = mapping.architecture if mapping else "own code"
    link = f"[{source[1]}](https://arxiv.org/abs/{source[1]})" if source else "ours"
    kinds = f"{config.block.name}, {config.norm.name}"
    cells = (file.stem, f"{count_parameters(config):,}", shape, kinds, position, mlp, loads_as, link)
    return f"| {' | '.join(cells)} |"


def test_table_of_presets() -> None:
    lines = [
        "| preset | parameters | layers x width, heads | block, norm | positions | mlp | export loads as | source |",
        "|---|---|---|---|---|---|---|---|",
        *(preset_row(file) for file in sorted(PRESETS.glob("*.yaml"))),
    ]
    assert "\n".join(lines) in README, "\n" + "\n".join(lines)


def test_table_of_slots() -> None:
    lines = ["| slot | names |", "|---|---|"]
    for slot, registry in SLOTS.items():
        entries = registry.entries.items()
        outside = [name for name, entry in entries if getattr(entry, "__module__", "").startswith("tests.")]
        names = sorted(name for name in registry.entries if name not in outside)
        lines.append(f"| `{slot}` | {', '.join(f'`{name}`' for name in names)} |")
    assert "\n".join(lines) in README, "\n" + "\n".join(lines)
