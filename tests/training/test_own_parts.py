"""Bugs in a user's own parts: before a run one line, in a run their own frames and then one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import command, run
from tests.helpers.tiny import write_config

MODEL_HEAD = """
import torch
from torch import nn

from flexbert import register
from flexbert_core.schema import Component
"""
HEAD = """
from composer import Algorithm, Callback
from composer.loggers import LoggerDestination

from data.feed.masking import MASKINGS, HidingConfig
from flexbert_core.schema import Component
from recipe.slots import ALGORITHMS, CALLBACKS, EVALUATIONS, LOGGERS, OBJECTIVES, OPTIMIZERS
"""

PART = """

@REGISTER
class Mine(BASE):
    class Config(CONFIG):
        pass

    def __init__(self, config):
        super().__init__()
"""


def source(register: str, base: str = "object", config: str = "Component") -> str:
    part = PART.replace("REGISTER", register).replace("BASE", base).replace("CONFIG", config)
    return (MODEL_HEAD if base == "nn.Module" else HEAD) + part


def model_part(slot: str) -> str:
    return source(f'register("{slot}", "mine")', "nn.Module")


CONTRACTS: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("callbacks", source('CALLBACKS.register("mine")', "Callback"), {"callbacks": ["mine"]}, "callbacks[0]", "plan, folder"),
    ("algorithms", source('ALGORITHMS.register("mine")', "Algorithm"), {"algorithms": ["mine"]}, "algorithms[0]", "plan, folder"),
    ("loggers", source('LOGGERS.register("mine")', "LoggerDestination"), {"loggers": ["tensorboard", "mine"]}, "loggers[1]", "name, run, folder"),
    ("evaluations", source('EVALUATIONS.register("mine")'), {"evaluations": ["mine"]}, "evaluations[0]", "run, plan, streams, folder"),
    ("objective", source('OBJECTIVES.register("mine")'), {"objective": "mine"}, "objective", "plan"),
    ("optimizer", source('OPTIMIZERS.register("mine")'), {"optimizer": "mine"}, "optimizer", "model, lr"),
    ("masking", source('MASKINGS.register("mine")', config="HidingConfig"), {"masking": "mine"}, "masking", "vocabulary"),
    ("norm", model_part("norm"), {"model": {"norm": "mine"}}, "norm", "hidden_size"),
    ("mlp", model_part("mlp"), {"model": {"mlp": "mine"}}, "mlp", "hidden_size, intermediate_size"),
    ("attention", model_part("attention"), {"model": {"attention": "mine"}}, "attention", "hidden_size, num_attention_heads, layer_index"),
    ("position", model_part("position"), {"model": {"position": "mine", "attention": "multihead"}}, "position", "model"),
]  # fmt: skip


def written(folder: Path, data: Path, text: str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(text)
    return write_config(folder, data, 2, "full", imports=["mine.py"], **changes)


@pytest.mark.parametrize(("text", "changes", "place", "facts"), [case[1:] for case in CONTRACTS], ids=[case[0] for case in CONTRACTS])  # fmt: skip
def test_a_constructor_that_takes_too_little_is_one_line_before_anything_starts(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, text: str, changes: dict[str, Any], place: str, facts: str
) -> None:
    file = written(tmp_path, tiny_data, text, **changes)
    first, begins = facts.partition(",")[0], text.split("@")[0].count("\n") + 1
    for options in (["--dry-run"], []):
        done = run(command("train", str(file), *options))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert f"{place}: mine (mine.py:{begins}): __init__ takes no '{first}': " in line
        assert f"write __init__(self, config, *, {facts}), see docs/extending" in line
    assert not (tmp_path / "run").exists()
