"""What a run tells of `rtd`: the parts of its loss, how replaced tokens of held-out text are detected, what is on the disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

import main
from commands.sizes import already_there, disk_need
from data.feed.held_out import HeldOutRows
from data.feed.loader import build_loader
from data.keyed import torch_seed
from data.store.shards import open_stream
from flexbert.dropout import TokenKeys
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import ROW
from tests.training.rtd_runs import KEPT, PHASES, RTD, TOKENS, files, lines, made, write
from training.objectives.rtd import SITE


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write(folder, tiny_data)))
    return folder


def test_the_parts_of_the_loss_add_up_to_it(straight: Path) -> None:
    trained = [line for line in lines(straight) if "loss" in line]
    assert ["parts" in line for line in trained] == [False] * 3 + [True] * 3
    config = load_run_config(straight / "train.yaml")
    batches = list(build_loader(PhasePlan(config).loader_config(config)))
    for line, batch in list(zip(trained, batches, strict=True))[3:]:
        parts, tokens, masked = line["parts"], batch["tokens"], batch["masked"]
        assert parts.keys() == {"generator", "detection"}
        expected = parts["generator"] * masked / 0.3 / tokens + 50 * parts["detection"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        streams = line["streams"].values()
        assert sum(each["loss"] * each["masked_tokens"] for each in streams) / masked == pytest.approx(
            parts["generator"], rel=1e-5
        )


@pytest.mark.slow
def test_detection_of_held_out_text_is_measured(ranks: Ranks, tiny_data: Path, tmp_path: Path, straight: Path) -> None:
    """The reference: all logits, document by document, with the draws of the rows' own keys. Two processes measure the
    same, and what is measured moves no weight."""
    ranks.train(1, str(write(tmp_path, tiny_data, evaluations=[{"name": "detection", "batch_size": 3}])))
    assert files(tmp_path) == files(straight)
    found = {line["step"]: line.get("evaluations") for line in lines(tmp_path) if "validation" in line}
    assert not found[3], "in the phase of mlm nothing is detected"
    scores: Any = found[6]
    scores = scores["detection"]
    config, model, _ = made(tmp_path / "train.yaml")
    weights = load_file(tmp_path / "run" / "checkpoints" / f"tokens-{2 * TOKENS}" / KEPT[0])
    model.load_state_dict(weights, strict=False)
    model.eval()
    seed, counts, losses = torch_seed(config.seed, "validation"), torch.zeros(5), [0.0, 0.0]
    (entry,) = config.evaluations
    tokens = masked_tokens = 0
    for number, name in enumerate(("full", "sparse")):
        stream = open_stream(f"{config.data.streams[name].path}/validation")
        for row, batch in enumerate(HeldOutRows(stream, ROW, None, seed).batches(1, entry.masking, Path, 0, 1)):
            ids, labels = batch["input_ids"], batch["labels"]
            masked, original = labels >= 0, torch.where(labels >= 0, labels, ids)
            chance = TokenKeys(torch_seed(seed, "replaced tokens", number), row, batch["row_bounds"], len(ids)).uniform(SITE)  # fmt: skip
            inputs = (batch["cu_seqlens"], batch["max_seqlen"])
            with torch.no_grad():
                logits = model.parts["generator"](ids, *inputs).logits
                shown = original.clone()
                for place in masked.nonzero().flatten().tolist():
                    reached = logits[place].double().softmax(0).cumsum(0).numpy()
                    shown[place] = int(np.searchsorted(reached, float(chance[place]), side="right"))
                told = model.parts["detector"].classifier(model.encoder(shown, *inputs)).squeeze(1)
            replaced = shown != original
            losses[0] += F.cross_entropy(logits[masked], labels[masked], reduction="sum").item()
            losses[1] += F.binary_cross_entropy_with_logits(told, replaced.float(), reduction="sum").item()
            hits = (told > 0) & replaced
            counts += torch.stack([((told > 0) == replaced).sum(), (told > 0).sum(), replaced.sum(), hits.sum(), masked.sum()])  # fmt: skip
            tokens, masked_tokens = tokens + len(ids), masked_tokens + int(masked.sum())
    right, said, replaced, both, _ = counts.tolist()
    assert scores["generator_loss"] == pytest.approx(losses[0] / masked_tokens, rel=1e-5)
    assert scores["loss"] == pytest.approx(losses[1] / tokens, rel=1e-4)
    assert (scores["accuracy"], scores["replaced"]) == (pytest.approx(right / tokens), pytest.approx(replaced / tokens))
    assert scores["recall"] == pytest.approx(both / replaced)
    assert scores["precision"] == (pytest.approx(both / said) if said else None)
    two = tmp_path / "two"
    ranks.train(2, str(write(two, tiny_data, evaluations=[{"name": "detection", "batch_size": 2}])))
    again = next(line["evaluations"]["detection"] for line in reversed(lines(two)) if "evaluations" in line)
    assert again == {key: value if value is None else pytest.approx(value, rel=1e-3) for key, value in scores.items()}


def test_detection_without_rtd_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    changes = {"phases": [PHASES[0]], "evaluations": ["detection"]}
    done = CliRunner().invoke(main.app, ["train", str(write(tmp_path, tiny_data, **changes)), "--dry-run"])
    assert done.exit_code == 2
    assert "evaluations[0].detection: no phase has objective rtd, so nothing is detected: leave it out" in done.output


def test_detection_of_next_tokens_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    changes = {"evaluations": [{"name": "detection", "masking": "next"}]}
    done = CliRunner().invoke(main.app, ["train", str(write(tmp_path, tiny_data, **changes)), "--dry-run"])
    assert done.exit_code == 2
    message = "evaluations[0].masking: 'next' hides no token, so nothing is filled in: use tokens, words or spans"
    assert done.output.strip().endswith(message)


PICKY = """
from data.feed.masking import MASKINGS, MaskingConfig

@MASKINGS.register("picky")
class Picky:
    class Config(MaskingConfig):
        pass
    def __init__(self, config, *, vocabulary):
        raise ValueError("does not know this tokenizer: use tokens")
"""


def test_a_masking_that_refuses_the_tokenizer_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    """Before a step is trained, whatever measures with it."""
    part = tmp_path / "picky.py"
    part.write_text(PICKY)
    names = ("held_out", "held_out_documents", "detection")
    cases = {f"evaluations: {name}": {"evaluations": [{"name": name, "masking": "picky"}]} for name in names}
    for place, changes in {**cases, "evaluation": {"evaluation": {"masking": "picky"}}}.items():
        file = write(tmp_path, tiny_data, imports=[str(part)], **changes)
        for arguments in (["--dry-run"], []):
            done = CliRunner().invoke(main.app, ["train", str(file), *arguments])
            assert done.exit_code == 2, done.output
            assert f"{place}.masking: does not know this tokenizer: use tokens" in done.output.splitlines()[-1]
            assert not (tmp_path / "run").exists()


def test_fsdp2_is_refused_in_one_line(tiny_data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_data, trainer={"parallelism": "fsdp2"})
    done = CliRunner().invoke(main.app, ["train", str(file)])
    assert done.exit_code == 2
    assert done.output.strip().count("\n") == 0
    assert "phases[1].objective: rtd: trainer.parallelism: fsdp2 cannot hold a generator: use ddp" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("embeddings", ["disentangled", pytest.param("tied", marks=pytest.mark.slow)])
def test_disk_room_counts_both_parts(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, embeddings: str
) -> None:
    """In each checkpoint, and beside the exports of their phase; what is there is counted, too."""
    folder = straight
    if embeddings == "tied":
        phases = [PHASES[0], {**PHASES[1], "objective": {**RTD, "embeddings": "tied"}}]
        ranks.train(1, str(write(tmp_path, tiny_data, phases=phases)))
        folder = tmp_path
    config = load_run_config(folder / "train.yaml")
    need = disk_need(config, PhasePlan(config))
    run = folder / "run"

    def tensors(path: Path) -> int:
        return sum(sum(t.nbytes for t in load_file(file).values()) for file in path.glob("*.safetensors"))

    last = f"tokens-{2 * TOKENS}"
    assert tensors(run / "checkpoints" / last) == pytest.approx(need.checkpoint, rel=0.02)  # the optimizer's counters
    beside = tensors(run / "generators" / last) + tensors(run / "detectors" / last)
    assert need.beside == beside
    files_there = [file for kind in ("checkpoints", "exports", "generators", "detectors") for file in (run / kind).rglob("*")]  # fmt: skip
    assert already_there(run) == sum(file.stat().st_size for file in files_there if file.is_file())
