"""`average`: the mean that numpy computes, in a folder that transformers loads; every wrong argument is one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from rich.console import Console
from safetensors.numpy import load_file, save
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner, Result

import main
from flexbert import from_hf
from tests.helpers.synthetic_runs import run_config, write_dataset
from training.trainer import train

PHASES = [
    {"name": "stable", "tokens": "4K", "max_seq_len": 64, "global_batch_size": 8, "lr": 1e-2},
    {"name": "extension", "tokens": "2K", "rope_theta": {"global_layers": 160000}},
]
CHECKPOINTS = range(512, 6145, 512)  # the last four, from 4608 on, with another theta


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    config = run_config(folder, write_dataset(folder / "data"), "words", "checkpoint.interval=512", phases=PHASES)
    train(config, Console(quiet=True))
    assert sorted(int(path.name[7:]) for path in (config.folder / "checkpoints").iterdir()) == list(CHECKPOINTS)
    return config.folder


def average(*arguments: Any) -> Result:
    return CliRunner().invoke(main.app, ["average", *map(str, arguments)])


def checkpoint(run: Path, tokens: int) -> Path:
    return run / "checkpoints" / f"tokens-{tokens}"


def weights(run: Path, tokens: int) -> dict[str, np.ndarray]:
    return {
        name: array.astype(float) for name, array in load_file(checkpoint(run, tokens) / "model.safetensors").items()
    }


def exported(folder: Path) -> dict[str, np.ndarray]:
    """An export's weights under our names."""
    return {name: tensor.numpy() for name, tensor in from_hf(folder).state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "chosen", "shares"),
    [
        (["--last", 3], [5120, 5632, 6144], [1, 1, 1]),
        (["--tokens", "1024,3.072K,512"], [1024, 3072, 512], [1, 1, 1]),
        (["--last", 2, "--weights", "1,3"], [5632, 6144], [0.25, 0.75]),
        (["--tokens", "512,2048", "--weights", "0,0.1"], [512, 2048], [0, 1]),
    ],
)
def test_it_is_the_mean(
    run: Path, tmp_path: Path, arguments: list[Any], chosen: list[int], shares: list[float]
) -> None:
    done = average(run, *arguments, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = exported(tmp_path / "out")
    parts = [weights(run, count) for count in chosen]
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        expected = np.average([part[name] for part in parts], axis=0, weights=shares)
        np.testing.assert_allclose(tensor, expected, rtol=1e-7, atol=1e-12)
    spread = max(np.abs(parts[0][name] - parts[1][name]).max() for name in found)
    assert spread > 1e-3  # so any one of them would not pass
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"an average of those of {len(chosen)} checkpoints" in card
    for count, share in zip(chosen, np.array(shares) / sum(shares), strict=True):
        assert f"words/tokens-{count} ({share:.4g})" in card
        assert f"words/tokens-{count} ({share:.4g})" in done.stdout
    assert f"# words, {max(chosen):,} tokens" in card


def test_checkpoints_by_name_are_what_last_finds(run: Path, tmp_path: Path) -> None:
    assert average(run, "--last", 2, "--output", tmp_path / "a").exit_code == 0
    paths = [checkpoint(run, 5632), checkpoint(run, 6144)]
    assert average(*paths, "--output", tmp_path / "b").exit_code == 0
    for name in ("model.safetensors", "README.md", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_transformers_loads_it_with_the_phases_theta(run: Path, tmp_path: Path) -> None:
    assert average(run, "--last", 2, "--output", tmp_path / "out").exit_code == 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.global_rope_theta == 160000
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("word1 word2 word3", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    ours = from_hf(tmp_path / "out").eval()
    with torch.no_grad():
        theirs = model(ids).logits[0]
        logits = ours(ids[0], torch.tensor([0, length], dtype=torch.int32), length).logits
    assert logits is not None
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["RUN"], "RUN: is a run: give either --last K or --tokens N1,N2 to choose from its checkpoints"),
        (["RUN", "--last", "2", "--tokens", "512,1024"], "RUN: is a run: give either --last K or --tokens N1,N2"),
        (["RUN", "--last", "13"], "--last: 13: give 2 to 12, so many checkpoints are in RUN"),
        (["RUN", "--last", "1"], "--last: 1: give 2 to 12"),
        (["RUN", "--tokens", "512,700"], "--tokens: 700: no such checkpoint in RUN, it has: 512, 1024, "),
        (["RUN", "--tokens", "512,many"], "--tokens: expected a count such as 50B, 300K or 1000000, got 'many'"),
        (["RUN", "--tokens", "512"], "RUN/checkpoints/tokens-512: is one checkpoint: an average needs two or more"),
        (["RUN", "--tokens", "512,512"], "RUN/checkpoints/tokens-512: is given twice: use --weights to count it more"),
        (["RUN", "--last", "2", "--weights", "1"], "--weights: 1 for 2 checkpoints: give one for each"),
        (["RUN", "--last", "2", "--weights", "1,x"], "--weights: 1,x: expected numbers such as 1,2,1"),
        (["RUN", "--last", "2", "--weights", "1,-1"], "--weights: 1,-1: must be 0 or more, and not all 0"),
        (["RUN", "--last", "2", "--weights", "0,0"], "--weights: 0,0: must be 0 or more, and not all 0"),
        (["RUN", "--last", "2", "--weights", "1,nan"], "--weights: 1,nan: must be 0 or more, and not all 0"),
        (["RUN/nothing"], "RUN/nothing: no such folder: give a run (runs/NAME) or its checkpoints/tokens-N"),
        (["RUN/exports", "RUN/tensorboard"], "RUN/exports: is no checkpoint (it has no manifest.json)"),
        (["RUN", "RUN/checkpoints/tokens-512"], "RUN: is a run among 2 folders: give one run, or checkpoints only"),
        (["RUN/checkpoints/tokens-512", "RUN/checkpoints/tokens-1024", "--last", "2"], "--last: chooses from a run, not from checkpoints"),
        (["RUN", "--tokens", "512,6144"], "RUN/checkpoints/tokens-6144: model.position is "),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(run: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    done = average(*(value.replace("RUN", str(run)) for value in arguments), "--output", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: " + line.replace("RUN", str(run)))
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    export = run / "exports" / "tokens-6144"
    before = (export / "model.safetensors").read_bytes()
    done = average(run, "--last", 2, "--output", export)
    assert (done.exit_code, done.stderr.split(": ")[1:4]) == (2, ["--output", str(export), "exists"])
    assert (export / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run, tmp_path / "copy")
    file = checkpoint(tmp_path / "copy", 5632) / name
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    done = average(tmp_path / "copy", "--last", 2, "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {file}: damaged checkpoint file")
    assert not (tmp_path / "out").exists()


def test_only_what_it_reads_must_be_whole(run: Path, tmp_path: Path) -> None:
    """The optimizer's state, twice the weights, is neither read nor verified."""
    shutil.copytree(run, tmp_path / "copy")
    os.truncate(checkpoint(tmp_path / "copy", 5632) / "optimizer.safetensors", 10)
    assert average(tmp_path / "copy", "--last", 2, "--output", tmp_path / "out").exit_code == 0


def rewritten(path: Path, name: str, data: bytes) -> Path:
    """A checkpoint that has been written with another content of one file."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_what_an_objective_trained_beside_the_model_has_no_part_in_it(run: Path, tmp_path: Path) -> None:
    """As rtd's generator, which a branch without the optimizer's state may not have; in whatever order."""
    shutil.copytree(run, tmp_path / "copy")
    tensors = load_file(checkpoint(run, 512) / "model.safetensors")
    parts = {**tensors, "parts.generator.weight": np.ones((2, 2), np.float32)}
    with_parts = rewritten(checkpoint(tmp_path / "copy", 512), "model.safetensors", save(parts))
    plain = checkpoint(run, 1024)
    for order, output in (((with_parts, plain), "a"), ((plain, with_parts), "b")):
        done = average(*order, "--output", tmp_path / output)
        assert done.exit_code == 0, done.output
    found, other = exported(tmp_path / "a"), weights(run, 1024)
    assert found.keys() == other.keys() == exported(tmp_path / "b").keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, (tensors[name] + other[name]) / 2, rtol=1e-6, atol=1e-12)
    name = sorted(tensors)[0]
    rewritten(with_parts, "model.safetensors", save({**tensors, name: tensors[name][:1]}))
    done = average(plain, with_parts, "--output", tmp_path / "c")
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1), done.output
    assert done.stderr.startswith(f"error: {with_parts}/model.safetensors: {name} is [1")


def test_runs_of_other_architectures_or_tokenizers_have_no_average(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(config.read_text().replace("intermediate_size: 32", "intermediate_size: 64"))
    both = [checkpoint(run, 512), checkpoint(tmp_path / "copy", 1024)]
    done = average(*both, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "model.intermediate_size is 64, in " in done.stderr
    shutil.copy(run / "config.yaml", config)
    state = both[1] / "state.json"
    node = json.loads(state.read_text())
    node["run"]["tokenizer"] = "another"
    rewritten(both[1], "state.json", json.dumps(node).encode())
    done = average(*both, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "another tokenizer than" in done.stderr
