"""Masking, objective, evaluations, algorithm and logger from outside: each equals its formula, trains, and goes on
after a kill."""

import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.core import Event
from safetensors.torch import load_file
from torch import Tensor

from commands.status import read_status
from data.feed.held_out import HeldOutRows
from data.feed.loader import build_loader
from data.feed.masking import MASKINGS, Vocabulary
from data.feed.philox import RowNames
from data.keyed import torch_seed
from data.store.shards import open_stream
from flexbert import build
from flexbert_core.schema import ConfigError, RunError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.slots import ALGORITHMS, OBJECTIVES
from tests.helpers.process import COUNTING
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, write_config
from training.evaluations import Evaluations

STEPS = 4
PARTS = ("span_masking", "every_token", "mean_similarity", "centred_gradients", "csv_logger")
DOORS: dict[str, Any] = {
    "imports": [str(ROOT / "examples" / f"{name}.py") for name in PARTS],
    "masking": {"name": "token_spans", "rate": 0.25},
    "objective": {"name": "every_token", "weight": 0.1},
    "evaluations": [
        {"name": "mean_similarity", "rows": 3},
        {"name": "held_out", "masking": {"name": "token_spans", "rate": 0.4}},
    ],
    "evaluation": {"max_rows": 4, "interval": 2 * ROWS * ROW},
    "algorithms": [{"name": "centred_gradients", "share": 0.5}],
    "loggers": ["csv"],
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, steps: int = STEPS) -> dict[str, Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"tokens-{steps * ROWS * ROW}" / "model.safetensors")


def saved_model(folder: Path, steps: int) -> Any:
    model = build(load_run_config(folder / "train.yaml").model)
    model.load_state_dict(weights(folder, steps), strict=False)  # a tied decoder has one name there
    return model.eval()


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write_config(folder, tiny_data, STEPS, "full", "sparse", **DOORS)))
    return folder


def test_the_objective_is_its_formula(tiny_data: Path, tmp_path: Path) -> None:
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", "sparse", **DOORS))
    plan = PhasePlan(config)
    objective = OBJECTIVES.build(config.objective, plan=plan)
    model = build(config.model, seed=1)
    batch = next(iter(build_loader(plan.loader_config(config))))
    loss = objective.loss(model, batch)
    assert (loss.count, objective.count(batch), loss.scores) == (len(batch["input_ids"]),) * 2 + (None,)
    loss.sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    logits: Any = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).logits
    expected = torch.zeros(())
    for row, token, label in zip(logits.log_softmax(1), batch["input_ids"], batch["labels"], strict=True):
        expected = expected - (row[label] if label >= 0 else 0.1 * row[token])
    torch.testing.assert_close(loss.sum, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.15, 0.6, 1.0])
def test_spans_have_their_rate_and_end_with_a_document(rate: float) -> None:
    special = np.arange(64) < 5
    vocabulary = Vocabulary(4, special, np.flatnonzero(~special), Path)
    masking = MASKINGS.build(MASKINGS.parse({"name": "token_spans", "rate": rate}), vocabulary=vocabulary)
    ids = np.full((300, 400), 9, np.uint16)
    ids[:, ::80], ids[:, 79::80] = 2, 3  # documents of 78 tokens
    rows = RowNames(np.full(300, 5, np.uint64), np.arange(300, dtype=np.uint32))
    targets = masking.mask(ids.reshape(-1), np.arange(1, 301) * 400, rows)
    selected = np.zeros(ids.size, bool)
    selected[targets.position] = True
    places = selected.reshape(-1, 80)
    assert not places[:, [0, 79]].any()
    # Behind its first tokens a document knows no border: the share is the rate, within six standard deviations of
    # spans of 10 tokens, the longest, that are drawn together.
    inner = places[:, 11:79]
    assert abs(inner.mean() - rate) <= 6 * math.sqrt(rate * (1 - rate) * 10 / inner.size) + 1e-12
    if rate < 1:
        together = (inner[:, 1:] & inner[:, :-1]).mean()
        assert together > 1.2 * rate**2, "neighbours are selected together"
        assert not selected.reshape(300, 400)[0].all()


def test_evaluations_are_in_the_metrics_and_right(straight: Path) -> None:
    measured = {line["step"]: line["evaluations"] for line in lines(straight) if "evaluations" in line}
    assert measured.keys() == {2, 4}
    config = load_run_config(straight / "train.yaml")
    for step, scores in measured.items():
        model = saved_model(straight, step)
        for name in ("full", "sparse"):
            stream = open_stream(f"{config.data.streams[name].path}/validation")
            batches = HeldOutRows(stream, ROW, 3, config.seed).batches(1, config.evaluation.masking, Path, 0, 1)
            means = []
            for batch in batches:
                states = model.encoder(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"])
                bounds = batch["cu_seqlens"].tolist()
                means += [states[a:b].mean(0) for a, b in pairwise(bounds)]
            pairs = [F.cosine_similarity(a, b, dim=0) for a in means for b in means if a is not b]
            assert scores["mean_similarity"][name] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
        validation = next(line["validation"] for line in lines(straight) if line["step"] == step)
        other = scores["held_out"]
        # The same text with more of it masked: 0.4 and 0.15 of it.
        assert 1.5 < other["masked_tokens"] / validation["masked_tokens"] < 4
        assert other["loss"] != validation["loss"]
    others = read_status(straight / "run")["others"]
    assert others["evaluations/mean_similarity/full"] == measured[4]["mean_similarity"]["full"]


def test_of_an_objective_without_scores_no_streams_are_shown(straight: Path) -> None:
    trained = [line for line in lines(straight) if "loss" in line]
    assert len(trained) == STEPS
    assert all(math.isfinite(line["loss"]) and "streams" not in line for line in trained)
    assert (straight / "run" / "exports" / f"tokens-{STEPS * ROWS * ROW}" / "config.json").is_file()


def rows(folder: Path) -> list[tuple[int, str, float]]:
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [(int(step), name, float(value)) for step, name, value in csv.reader(file)]


def test_the_logger_has_a_row_of_each_metric(straight: Path) -> None:
    expected = [(line["step"], "train/loss", line["loss"]) for line in lines(straight)]
    expected += [
        (line["step"], "validation/loss", line["validation"]["loss"])
        for line in lines(straight)
        if "validation" in line
    ]
    assert sorted(rows(straight)) == sorted(expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_algorithm_takes_the_mean_of_rows(tiny_data: Path, tmp_path: Path, share: float) -> None:
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", **DOORS))
    entry = ALGORITHMS.parse({"name": "centred_gradients", "share": share})
    algorithm = ALGORITHMS.build(entry, plan=PhasePlan(config), folder=tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    gradients = [torch.randn(parameter.shape) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    state: Any = type("State", (), {"model": model})
    algorithm.apply(Event.AFTER_TRAIN_BATCH, state, None)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        rows = gradient.tolist() if gradient.ndim > 1 else []
        centred = torch.tensor([[x - share * sum(row) / len(row) for x in row] for row in rows])
        torch.testing.assert_close(parameter.grad, centred if gradient.ndim > 1 else gradient)


@pytest.mark.parametrize(
    ("processes", "trainer"),
    [
        (1, {"microbatch_size": 3}),
        (2, {}),
        pytest.param(2, {"parallelism": "fsdp2", "microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param(1, {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_however_a_step_is_split_it_is_the_same(
    straight: Path, ranks: Ranks, tiny_data: Path, tmp_path: Path, processes: int, trainer: dict[str, Any]
) -> None:
    """The count of targets is the objective's own, so microbatches and ranks are weighed by it."""
    changes = {**DOORS, "trainer": {"log_interval": 1, **trainer}, "imports": [*DOORS["imports"], COUNTING]}
    file = write_config(tmp_path, tiny_data, STEPS, "full", "sparse", **changes)
    ranks.train(processes, str(file), extra={"COUNTS": str(tmp_path)})
    for ours, theirs in zip(lines(tmp_path), lines(straight), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if "evaluations" in ours:
            assert ours["evaluations"]["mean_similarity"] == pytest.approx(
                theirs["evaluations"]["mean_similarity"], abs=1e-4
            )


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_as_if_never_killed(straight: Path, ranks: Ranks, tiny_data: Path, tmp_path: Path, processes: int) -> None:
    file = write_config(tmp_path, tiny_data, STEPS, "full", "sparse", **DOORS)
    ranks.train(processes, str(file))
    first = weights(tmp_path)
    for step in (3, 4):  # as a run is that was killed after its second checkpoint
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"tokens-{step * ROWS * ROW}")
    (tmp_path / "run" / "summary.json").unlink()
    ranks.train(processes, str(file))
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path).items())
    assert [line["step"] for line in lines(tmp_path) if "evaluations" in line] == [2, 4]
    if processes == 1:
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights(straight).items())
        assert rows(tmp_path) == rows(straight)


class Wrong:
    """An evaluation that gives what it is told to."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def run(self, model: Any, step: int) -> Any:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        (3.0, "evaluations: wrong: run() gives a float: give numbers by name"),
        ({"a": torch.ones(())}, "evaluations: wrong: a is a Tensor: give a plain number, or null"),
        ({"a": {"b": "good"}}, "evaluations: wrong: a: b is a str: give a plain number, or null"),
    ],
)
def test_what_is_no_score_is_told(tiny_data: Path, tmp_path: Path, scores: Any, line: str) -> None:
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, "full"))
    plan, model = PhasePlan(config), build(config.model, seed=torch_seed(config.seed, "init"))
    streams = build_loader(plan.loader_config(config)).dataset.streams
    from contextlib import nullcontext

    class Nowhere:
        def log_metrics(self, metrics: dict[str, float]) -> None:
            pass

    evaluations = Evaluations(config, plan, streams, model, None, nullcontext, lambda text: None)
    evaluations.others["wrong"] = Wrong(scores)
    with pytest.raises(RunError) as error:
        evaluations.run(1, Nowhere())  # pyright: ignore[reportArgumentType]
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"masking": "spns"}, "masking: unknown masking 'spns', did you mean 'spans'?"),
        ({"masking": {"name": "token_spans", "p": 2}}, "masking.p: should be less than or equal to 1, got 2"),
        ({"objective": "mml"}, "objective: unknown objective 'mml', did you mean 'mlm'?"),
        ({"evaluations": ["held-out"]}, "evaluations[0]: unknown evaluation 'held-out', did you mean 'held_out'?"),
        ({"evaluation": {"masking": "spans", "rate": 0.1}}, "evaluation: unknown key 'rate'"),
    ],
)
def test_wrong_names_and_options_are_one_line(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    file = write_config(tmp_path, tiny_data, STEPS, "full", **{**DOORS, **changes})
    with pytest.raises(ConfigError) as error:
        load_run_config(file)
    assert line in str(error.value)


def test_a_phase_takes_over_a_masking_of_the_same_name_only(tiny_data: Path, tmp_path: Path) -> None:
    shape = {"tokens": ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    maskings: list[Any] = [{"rate": 0.5}, {"name": "tokens", "mask_fraction": 0.7}, "token_spans", None]
    phases = [{"name": f"p{n}", **shape, "masking": masking} for n, masking in enumerate(maskings)]
    changes = {**DOORS, "masking": {"name": "token_spans", "p": 0.5, "rate": 0.2}, "phases": phases}
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", **changes)))
    found = [phase.masking.model_dump(exclude_defaults=True) for phase in plan.phases]
    assert found == [
        {"name": "token_spans", "rate": 0.5, "p": 0.5},
        {"name": "tokens", "mask_fraction": 0.7},
        {"name": "token_spans"},
        {"name": "token_spans"},
    ]


def test_an_evaluation_fits_the_model(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, STEPS, "full", evaluations=[{"name": "held_out", "max_seq_len": 4096}])
    with pytest.raises(ConfigError, match=r"evaluations\[0\].max_seq_len: over model.max_position_embeddings 64"):
        load_run_config(file)


REFUSING = """
import torch
from data.feed.masking import MASKINGS, MaskingConfig, Targets
from flexbert_core.schema import Component
from recipe.slots import EVALUATIONS, OBJECTIVES
from training.objectives import Loss

@MASKINGS.register("odd")
class Odd:
    class Config(MaskingConfig):
        gives: str = "refusal"
    def __init__(self, config, *, vocabulary):
        if config.gives == "refusal":
            raise ValueError("not with this vocabulary")
        self.gives = config.gives
    def mask(self, input_ids, row_ends, rows):
        import numpy as np
        two = np.array([1, 2], np.int32)
        return {
            "nothing": None,
            "floats": Targets(two / 2, input_ids[two]),
            "backwards": Targets(two[::-1], input_ids[two]),
            "twice": Targets(two * 0 + 1, input_ids[two]),
            "behind": Targets(two + len(input_ids), input_ids[two]),
            "short": Targets(two, input_ids[:1]),
            "strange": Targets(two, two + 9000),
        }[self.gives]

@OBJECTIVES.register("odd")
class OddObjective(torch.nn.Module):
    class Config(Component):
        gives: str = "tensor"
    def __init__(self, config, *, plan):
        super().__init__()
        self.gives = config.gives
        if self.gives == "weights":
            self.weight = torch.nn.Parameter(torch.ones(1))
        if self.gives == "refusal":
            raise ValueError("not in this plan")
    def count(self, batch):
        if self.gives == "tensor":
            return batch["cu_seqlens"][-1]
        return 0.5 if self.gives == "fraction" else batch["masked"]
    def loss(self, model, batch):
        loss = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"], batch["labels"])
        return Loss(loss.loss, batch["masked"] + 1)
"""


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        ({"masking": "odd"}, 2, "phases[0].masking: not with this vocabulary"),
        ({"masking": {"name": "odd", "gives": "nothing"}}, 1, "masking 'odd': gives a NoneType: give data.feed.masking.Targets"),
        pytest.param({"masking": {"name": "odd", "gives": "floats"}}, 1, "masking 'odd': position is no array of whole numbers", marks=pytest.mark.slow),
        pytest.param({"masking": {"name": "odd", "gives": "backwards"}}, 1, "masking 'odd': its positions must ascend, each once", marks=pytest.mark.slow),
        ({"masking": {"name": "odd", "gives": "twice"}}, 1, "masking 'odd': its positions must ascend, each once"),
        pytest.param({"masking": {"name": "odd", "gives": "behind"}}, 1, "masking 'odd': its positions must ascend, each once", marks=pytest.mark.slow),
        pytest.param({"masking": {"name": "odd", "gives": "short"}}, 1, "masking 'odd': gives 1 tokens for 2 positions", marks=pytest.mark.slow),
        ({"masking": {"name": "odd", "gives": "strange"}}, 1, "masking 'odd': a token is not of the vocabulary"),
        ({"objective": "odd"}, 1, "objective: count() gives tensor("),
        ({"objective": {"name": "odd", "gives": "fraction"}}, 1, "objective: count() gives 0.5: give a plain int"),
        ({"objective": {"name": "odd", "gives": "other"}}, 1, "objective: its loss is over "),
        ({"objective": {"name": "odd", "gives": "weights"}}, 2, "objective: 'odd' has parameters of its own"),
        ({"objective": {"name": "odd", "gives": "refusal"}}, 2, "objective: not in this plan"),
    ],
)  # fmt: skip
def test_odd_parts_are_one_line(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, changes: dict[str, Any], code: int, line: str
) -> None:
    """What can be known is told before a run folder is there, and by --dry-run too."""
    (tmp_path / "odd.py").write_text(REFUSING)
    file = write_config(tmp_path, tiny_data, STEPS, "full", **{"imports": ["odd.py"], **changes})
    codes, text = ranks.run(1, "train", str(file))
    assert codes == [code], text
    assert line in text
    assert "Traceback" not in text
    if code == 2:
        assert not (tmp_path / "run").exists()
        codes, text = ranks.run(1, "train", str(file), "--dry-run")
        assert codes == [2]
        assert line in text
