"""Bugs in a user's own parts: before a run one line, in a run their own frames and then one line."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.process import environment
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


RAISES: dict[str, tuple[str, dict[str, Any]]] = {
    "callbacks": (
        """
@CALLBACKS.register("mine")
class Mine(Callback):
    class Config(Component):
        pass

    def __init__(self, config, *, plan, folder):
        pass

    def batch_end(self, state, logger):
        fail()
""",
        {"callbacks": ["mine"]},
    ),
    "algorithms": (
        """
@ALGORITHMS.register("mine")
class Mine(Algorithm):
    class Config(Component):
        pass

    def __init__(self, config, *, plan, folder):
        pass

    def match(self, event, state):
        return True

    def apply(self, event, state, logger):
        fail()
""",
        {"algorithms": ["mine"]},
    ),
    "loggers": (
        """
@LOGGERS.register("mine")
class Mine(LoggerDestination):
    class Config(Component):
        pass

    def __init__(self, config, *, name, run, folder):
        pass

    def log_metrics(self, metrics, step=None):
        fail()
""",
        {"loggers": ["mine"]},
    ),
    "evaluations": (
        """
@EVALUATIONS.register("mine")
class Mine:
    class Config(Component):
        pass

    def __init__(self, config, *, run, plan, streams, folder):
        pass

    def run(self, model, step):
        fail()
""",
        {"evaluations": ["mine"]},
    ),
    "objective": (
        """
@OBJECTIVES.register("mine")
class Mine:
    class Config(Component):
        pass

    def __init__(self, config, *, plan):
        pass

    def count(self, batch):
        return batch["masked"]

    def loss(self, model, batch):
        fail()
""",
        {"objective": "mine"},
    ),
    "masking": (
        """
@MASKINGS.register("mine")
class Mine:
    class Config(HidingConfig):
        pass

    def __init__(self, config, *, vocabulary):
        pass

    def mask(self, input_ids, row_ends, rows):
        fail()
""",
        {"masking": "mine"},
    ),
}
FAIL = """

def fail():
    raise {error}
"""


@pytest.mark.parametrize("slot", RAISES)
def test_a_part_that_raises_in_a_run_is_named_behind_its_own_frames(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, slot: str
) -> None:
    text, changes = RAISES[slot]
    text = HEAD + text + FAIL.format(error='ValueError("two\\nlines")')
    done = run(command("train", str(written(tmp_path, tiny_data, text, **changes))))
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == f"error: {slot}: mine (mine.py:{text.count(chr(10))}): ValueError: two lines"
    first = lines.index("Traceback (most recent call last):")
    assert f'File "{tmp_path}/mine.py", line ' in lines[first + 1]
    assert len(lines) - first < 15


@pytest.mark.parametrize("error", ['FileNotFoundError(2, "none", "x.txt")', 'RuntimeError("no")'])
def test_what_a_run_says_of_errors_of_its_own_does_not_hide_a_part_that_raises_them(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, error: str
) -> None:
    text, changes = RAISES["callbacks"]
    done = run(command("train", str(written(tmp_path, tiny_data, HEAD + text + FAIL.format(error=error), **changes))))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: callbacks: mine (mine.py:2"), done.stderr
    assert f"{error.partition('(')[0]}: " in done.stderr.splitlines()[-1]


def test_a_masking_that_raises_in_a_worker_of_the_loader_is_named(
    ranks: Ranks, tiny_data: Path, tmp_path: Path
) -> None:
    text, changes = RAISES["masking"]
    text = HEAD + text + FAIL.format(error='ValueError("no")')
    file = written(tmp_path, tiny_data, text, **changes)
    # A process of its own, which must come to its end: it waited five minutes for its worker.
    arguments = command("train", str(file), "data.num_workers=1")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1, done.stderr
    line = f"error: masking: mine (mine.py:{text.count(chr(10))}): ValueError: no"
    assert done.stderr.splitlines()[-1] == line, done.stderr


@pytest.mark.parametrize(
    ("slot", "fault"),
    [
        ("head", "mine has no method `decoder`: see docs/extending/head.md"),
        (
            "embedding",
            "mine has no module `tokens` with a weight (V, D), to which heads tie their decoder: "
            "see docs/extending/embedding.md",
        ),
    ],
)
def test_what_a_part_must_have_beside_its_forward_is_said(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, slot: str, fault: str
) -> None:
    text = MODEL_HEAD + SHAPED.replace("SLOT", slot).replace("GIVEN", "states")
    text = text.replace("decoder", "other").replace("self.tokens", "self.others")
    file = written(tmp_path, tiny_data, text, model={slot: "mine"})
    for options in (["--dry-run"], []):
        done = run(command("train", str(file), *options))
        assert (done.returncode, done.stderr) == (2, f"error: {file}: model.{slot}: {fault}\n")
    assert not (tmp_path / "run").exists()


SHAPED = """

@register("SLOT", "mine")
class Mine(nn.Module):
    task, needs_final_norm, norm = "mlm", False, True

    class Config(Component):
        norm: bool = True

    def __init__(self, config, **facts):
        super().__init__()
        self.tokens = nn.Embedding(8, 16)

    def decoder(self, embeddings):
        return embeddings, None

    def forward(self, states, *others, **more):
        return GIVEN
"""


@pytest.mark.parametrize(
    ("slot", "given", "fault"),
    [
        ("mlp", "states[:, :4]", "forward gives (6, 4) for (6, 16): give the same shape"),
        ("norm", "states.mean(-1)", "forward gives (6,) for (6, 16): give the same shape"),
        ("attention", "(states, None)", "forward gives a tuple for (6, 16): give the same shape, a tensor"),
        ("block", "states[1:]", "forward gives (5, 16) for (6, 16): give the same shape"),
        ("head", "states.new_zeros(6, 9)", "forward gives (6, 9) for (6, 16): give the same shape"),
        ("embedding", "torch.zeros(6, 8)", "forward gives (6, 8) for (6,): give (6, 16)"),
    ],
)
def test_a_wrong_shape_is_one_line_before_anything_starts(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, slot: str, given: str, fault: str
) -> None:
    text = MODEL_HEAD + SHAPED.replace("SLOT", slot).replace("GIVEN", given)
    file = written(tmp_path, tiny_data, text, model={slot: "mine"})
    for options in (["--dry-run"], []):
        done = run(command("train", str(file), *options))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"error: {file}: model.{slot}: mine (mine.py:")
        assert line.endswith(f"): {fault}")
    assert not (tmp_path / "run").exists()
