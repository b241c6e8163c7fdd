"""What a revision holds: a card with all that the run knows, files for sentence-transformers, and nothing private."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from evals.models import digest_of
from evals.publishing.revisions import Revision, find_revisions
from evals.publishing.shareable import training_config
from recipe.config import load_run_config, read_recorded_config
from tests.helpers.in_process import PER_STEP, branch, go
from tests.helpers.publishing import EXPORTS
from tests.helpers.tiny import write_config
from training.folder import RunFolder

TARGET = ["publish.repo=org/model", "publish.licence=apache-2.0", "publish.language=[en]"]


def revisions(run: Path, *overrides: str, results: tuple[Path, ...] = ()) -> dict[str, Revision]:
    config = read_recorded_config(run / "config.yaml", overrides or TARGET)
    return {each.name: each for each in find_revisions(RunFolder(run), config, results)}


def text_of(revision: Revision, name: str = "README.md") -> str:
    content = revision.files()[name]
    return content.decode() if isinstance(content, bytes) else content.read_text()


def test_every_export_is_a_revision(finished: Path) -> None:
    found = revisions(finished)
    assert list(found) == EXPORTS
    assert [each.tokens for each in found.values()] == [0, *[2 * PER_STEP] * 2, *[3 * PER_STEP] * 2]
    for name, revision in found.items():
        files = revision.files()
        export = {path.name for path in (finished / "exports" / name).iterdir()}
        ours = {"training_config.yaml", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
        assert set(files) == export | ours | ({"curves.png"} if revision.tokens else set())
        if revision.tokens:
            picture = files["curves.png"]
            assert isinstance(picture, bytes)
            assert picture.startswith(b"\x89PNG")
            assert revision.files()["curves.png"] == picture  # the same at each look: no commit without a change
    assert len({each.stamp for each in found.values()}) == len(found)
    assert {name: each.stamp for name, each in revisions(finished).items()} == {
        name: each.stamp for name, each in found.items()
    }


def test_the_card_says_what_the_run_knows(finished: Path) -> None:
    found = revisions(finished)
    last = f"tokens-{3 * PER_STEP}"
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = next(line for line in lines if line.get("tokens") == 3 * PER_STEP and "validation" in line)
    for name, key in ((last, "validation"), (f"{last}-ema", "validation_ema")):
        card = ModelCard(text_of(found[name]), ignore_metadata_errors=False)
        data: Any = card.data
        assert (data.license, data.language, data.library_name, data.pipeline_tag) == (
            "apache-2.0",
            ["en"],
            "transformers",
            "fill-mask",
        )
        assert "sentence-transformers" in (data.tags or [])
        assert data.eval_results is not None
        measured = {each.metric_name: each.metric_value for each in data.eval_results}
        assert measured == {
            "held-out loss (nats)": scores[key]["loss"],
            "masked accuracy": scores[key]["masked_accuracy"],
        }
        text = card.text
        assert f'AutoModel.from_pretrained("org/model", revision="{name}")' in text
        assert f'SentenceTransformer("org/model", revision="{name}")' in text
        assert f'pipeline("fill-mask", model="org/model", revision="{name}")' in text
        assert "flexbert.from_hf(" in text
        assert "![loss, learning rate" in text
        parity = json.loads((finished / "exports" / name / "parity.json").read_text())
        assert 0 <= parity["largest_logit_difference"] <= parity["tolerance"] == 1e-4
        assert f"by {parity['largest_logit_difference']:.1e} at most" in " ".join(text.split())
        assert ("exponential moving average" in text) == name.endswith("-ema")
    ledger = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    seen = ledger[-1]["streams"]["full"]["tokens"]
    total = sum(stream["tokens"] for stream in ledger[-1]["streams"].values())
    assert f"| full | {seen:,} | {seen / total:.1%} |" in text_of(found[last])
    first = text_of(found["tokens-0"])
    assert "model-index" not in first
    assert "curves.png" not in first
    assert "stream" not in first.split("## How to load")[0].split("\n|")[-1]


def test_a_card_without_licence_or_repo(finished: Path) -> None:
    text = text_of(revisions(finished, "publish.folder=x")["tokens-0"])
    assert "license" not in text
    assert 'AutoModel.from_pretrained("PATH/TO/THIS/FOLDER")' in text


def test_results_of_evaluations_reach_the_card(finished: Path, tmp_path: Path) -> None:
    """By the bytes of the weights that were measured."""
    run = shutil.copytree(finished, tmp_path / "run")
    name = f"tokens-{2 * PER_STEP}"
    node: dict[str, Any] = {
        "evaluation": "glue-quick",
        "model": {"digest": digest_of(run / "exports" / name), "tokens": 2 * PER_STEP},
        "scores": {"sst2": {"accuracy": {"mean": 0.75, "deviation": 0.1}}, "mean": 0.5, "note": "x", "absent": None},
        "complete": True,
        "config": {"name": "glue"},
        "written": "2026-12-02T08:00:00+00:00",
    }
    older = {"scores": {"mean": 0.25}, "written": "2026-12-01T08:00:00+00:00"}  # of the same weights under another name
    others = ({"complete": False}, {"model": {**node["model"], "digest": "0"}}, older)
    for number, changes in enumerate(({}, *others)):
        file = tmp_path / "results" / str(number) / "results.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({**node, **changes}))
    (run / "evaluations/own").mkdir(parents=True)
    (run / "evaluations/own/results.json").write_text(json.dumps({**node, "evaluation": "own", "scores": {"f1": 0.25}}))
    before = revisions(run)
    found = revisions(run, results=(tmp_path / "results",))
    data: Any = ModelCard(text_of(found[name])).data
    assert data.eval_results is not None
    assert sorted((each.dataset_name, each.task_type, each.metric_value) for each in data.eval_results) == [
        ("glue-quick", "text-classification", 0.5),
        ("glue-quick", "text-classification", 0.75),
        ("own", "text-classification", 0.25),
    ]
    assert "glue-quick" not in text_of(found[f"{name}-ema"])
    changed = [each for each in found if found[each].stamp != before[each].stamp]
    assert changed == [name]


def test_damaged_results_are_left_out(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "results.json").write_text("[1]")
    revisions(finished, results=(tmp_path,))
    assert "results.json: no results of `main.py eval`" in caplog.text


def test_nothing_private_is_published(tiny_data: Path, tmp_path: Path) -> None:
    """No path, no bucket, no key, no name of a machine: in any file of any revision."""
    origin = go(write_config(tmp_path / "home-of-alice" / "first", tiny_data, 1))
    file = branch(
        tmp_path / "home-of-alice" / "second",
        tiny_data,
        str(origin),
        1,
        loggers=[{"name": "composer", "class": "InMemoryLogger"}],
        checkpoint={"remote": f"file://{tmp_path}/bucket-of-alice", "exports": "permanent"},
        trainer={"price_per_hour": 1234.5},
        algorithms=[
            {"name": "composer", "class": "GradientClipping", "arguments": {"clipping_type": "norm", "clipping_threshold": 1.0}}
        ],
    )  # fmt: skip
    run = go(file)
    words = [str(tmp_path), "alice", "1234.5", "InMemoryLogger"]
    for target in (TARGET, [f"publish.folder={tmp_path}/published-of-alice"]):
        found = revisions(run, *target)
        assert len(found) == 2
        for revision in found.values():
            for name, content in revision.files().items():
                data = content if isinstance(content, bytes) else content.read_bytes()
                assert [word for word in words if word.encode() in data] == [], name
    assert "Started from the weights of `checkpoints/tokens-" in text_of(found["tokens-0"])


def test_the_training_config_is_a_run_file(finished: Path, tmp_path: Path) -> None:
    recorded = read_recorded_config(finished / "config.yaml", TARGET)
    file = tmp_path / "training_config.yaml"
    file.write_text(training_config(recorded))
    again = load_run_config(file)
    assert again.name == recorded.name
    for key in ("model", "phases", "optimizer", "masking", "objective", "evaluation", "ema", "seed", "algorithms"):
        assert getattr(again, key) == getattr(recorded, key), key
    assert list(again.data.streams) == list(recorded.data.streams)
    assert again.publish is None


def test_secrets_in_components_are_removed(finished: Path) -> None:
    arguments = {
        "api_key": "k1",
        "auth_token": "t1",
        "password": "p1",
        "place": "/home/alice/x/y",
        "url": "s3://b/c/d/e",
    }
    recorded = read_recorded_config(finished / "config.yaml", TARGET)
    entry: Any = OmegaConf.to_container(OmegaConf.create({"name": "composer", "arguments": arguments}))
    node = yaml.safe_load(training_config(recorded.model_copy(update={"algorithms": [entry]})))
    assert node["algorithms"][0]["arguments"] == {
        "api_key": "REMOVED",
        "auth_token": "REMOVED",
        "password": "REMOVED",
        "place": "x/y",
        "url": "d/e",
    }
