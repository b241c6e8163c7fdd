"""A run that moved goes on: data, tokenizer, run folder, machine. What would change its history does not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel
from typer.testing import CliRunner

import main
from flexbert_core.schema import MAY_CHANGE, ConfigError
from recipe.config import RunConfig, load_run_config
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import write_config
from training.folder import RunFolder


@pytest.fixture(scope="module")
def begun(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, train.yaml and run/, whose last step is to be evaluated and exported again."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_data, folder / "data")
    ranks.train(1, str(write_config(folder, folder / "data", 2)))
    (folder / "run" / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("moved", ["data", "linked", "memory", "renamed", "home"])
def test_a_run_whose_files_moved_goes_on(
    begun: Path, ranks: Ranks, tmp_path: Path, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(begun, tmp_path / "x")
    folder, overrides, name = tmp_path / "x", ["runs=" + str(tmp_path / "x")], "run"
    if moved == "data":
        (folder / "data").rename(folder / "elsewhere")
        overrides += [f"data.tokenizer={folder}/elsewhere/tokenizer"]
        overrides += [
            f"data.streams.{stream}.path={folder}/elsewhere/{stream}" for stream in ("full", "sparse", "empty")
        ]
    elif moved == "memory":
        overrides += ["evaluation.batch_size=3", "evaluation.interval=1M", "model.attention.backend=sdpa"]
    elif moved == "renamed":
        (folder / "run").rename(folder / "renamed")
        overrides, name = [*overrides, "name=renamed"], "renamed"
    elif moved == "linked":
        (folder / "link").symlink_to(folder / "data")
        overrides += [f"data.streams.full.path={folder}/link/full/"]
    else:  # old records have ~ as it was given
        record = OmegaConf.load(folder / "run" / "config.yaml")
        OmegaConf.update(record, "data.cache", "~/.cache/flexbert")
        OmegaConf.save(record, folder / "run" / "config.yaml")
    text = ranks.train(1, str(folder / "train.yaml"), *overrides)
    assert f"{folder / name}: resuming after step 2, 2 steps" in text
    assert (folder / name / "summary.json").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["evaluation.max_rows=3", "evaluation.batch_size=3", "seed=18"], "this run was started otherwise (it stands at step 2, in phases[0], all): evaluation.max_rows was 4, now 3; seed was 17, now 18: undo that; or begin "),
        (["phases.0.lr=1"], "phases.0.lr was 0.01, now 1.0: "),
        (["model.norm.name=rmsnorm"], "model.norm.name was 'layernorm', now 'rmsnorm': "),
        (["data.shuffle_shards=1"], "data.shuffle_shards was not set, now 1: "),
        (["trainer.precision=amp_bf16"], "trainer.precision was 'auto', now 'amp_bf16': "),
    ],
)  # fmt: skip
def test_what_would_change_its_history_is_refused(begun: Path, overrides: list[str], line: str) -> None:
    config = load_run_config(begun / "train.yaml", overrides)
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun / "run").check_config(config)
    message = str(caught.value)
    assert line in message
    assert len(message.splitlines()) == 1
    assert message.count(" was ") == line.count(" was ") + (
        not line.startswith("this run")
    )  # what may differ is not listed


def test_a_default_that_is_said_is_no_change(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    begun = load_run_config(file, ["data.lanes=null"])
    folder = RunFolder(begun.folder)
    folder.open(begun)
    folder.close()
    folder.check_config(load_run_config(file, [f"data.lanes={begun.lanes}"]))
    with pytest.raises(ConfigError, match=f"data.lanes was {begun.lanes}, now {begun.lanes // 2}: "):
        folder.check_config(load_run_config(file, [f"data.lanes={begun.lanes // 2}"]))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data_under_the_same_name_are_refused(begun: Path, ranks: Ranks, tmp_path: Path, split: str) -> None:
    """Their fingerprints are compared, wherever they lie: here the stream's split is another stream's."""
    shutil.copytree(begun, tmp_path / "x")
    data = tmp_path / "x" / "data"
    shutil.rmtree(data / "sparse" / split)
    shutil.copytree(data / "full" / split, data / "sparse" / split)
    given = [f"runs={tmp_path}/x", *(f"data.streams.{name}.path={data}/{name}" for name in ("full", "sparse", "empty"))]
    codes, text = ranks.run(1, "train", str(tmp_path / "x" / "train.yaml"), *given)
    assert codes == [2], text
    assert "data.streams" in text.strip().splitlines()[-1]
    assert "shards are not those that" in text.strip().splitlines()[-1]


def test_a_moved_origin_is_not_needed(begun: Path, ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "branch.yaml"
    shutil.copy(begun / "train.yaml", file)
    origin = tmp_path / "origin"
    shutil.copytree(begun / "run", origin)
    ranks.train(1, str(file), "name=branch", f"runs={tmp_path}", f"from={origin}")
    (tmp_path / "branch" / "summary.json").unlink()
    origin.rename(tmp_path / "gone")
    text = ranks.train(1, str(file), "name=branch", f"runs={tmp_path}", f"from={tmp_path / 'gone'}")
    assert f"from: {tmp_path / 'gone'}: is not read any more: this run has begun, see " in text
    assert "resuming after step 2" in text


def test_the_marks_are_at_the_fields() -> None:
    """Where things lie may change, in every section."""

    def marked(schema: type[BaseModel], prefix: str = "") -> set[str]:
        found = set[str]()
        for name, field in schema.model_fields.items():
            if field.json_schema_extra == MAY_CHANGE:
                found.add(prefix + name)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found |= marked(field.annotation, f"{prefix}{name}.")
        return found

    found = marked(RunConfig)
    assert {"name", "runs", "imports", "data.tokenizer", "data.cache", "checkpoint", "evaluation.batch_size"} <= found
    assert not found & {"seed", "model", "phases", "masking", "optimizer", "ema", "evaluation.max_rows", "data.lanes"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_every_path_of_a_run_file_knows_home(home: Path, tiny_data: Path) -> None:
    (home / "mine.py").write_text("")
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(write_config(home, tiny_data, 1)))  # pyright: ignore
    node |= {"runs": "~/runs", "imports": ["~/mine.py"], "from": "~/hf"}
    node["model"]["init"] = {"from": "~/small"}
    node["data"] = {"tokenizer": "~/t", "cache": "~/c", "streams": {"a": {"path": "~/a"}, "b": {"path": "s3://b/~/b"}}}
    OmegaConf.save(OmegaConf.create({"defaults": ["~/base.yaml"], "seed": 3}), home / "run.yaml")
    OmegaConf.save(OmegaConf.create(node), home / "base.yaml")
    config = load_run_config(home / "run.yaml")
    assert config.origin is not None
    assert (config.runs, config.imports, config.origin.checkpoint) == (
        f"{home}/runs",
        [f"{home}/mine.py"],
        f"{home}/hf",
    )
    assert (config.data.tokenizer, config.data.cache) == (f"{home}/t", f"{home}/c")
    assert [stream.path for stream in config.data.streams.values()] == [f"{home}/a", "s3://b/~/b"]
    assert config.model.init.source == f"{home}/small"
    for key in ("runs", "data.tokenizer", "data.cache", "from", "model.init.from", "data.streams.a.path"):
        with pytest.raises(ConfigError, match=r"~nobody99 has no home folder here: write \./~nobody99"):
            load_run_config(home / "run.yaml", [f"{key}=~nobody99/x"])
    with pytest.raises(ConfigError, match="data.cache: expected a folder on local disk"):
        load_run_config(home / "run.yaml", ["data.cache=s3://bucket/x"])


def test_every_path_of_the_command_line_knows_home(home: Path, begun: Path) -> None:
    """Also where no shell expands it."""
    shutil.copytree(begun, home / "x")

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(main.app, list(arguments))
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    invoke("train", "~/x/train.yaml", "--dry-run")
    assert '"state": "stopped"' in invoke("status", "--json", "~/x/run")
    invoke("inspect", "~/x/run", "--step", "1", "--json")
    invoke("inspect", "~/x/data/full", "--samples", "0")
    invoke("report", "~/x/run", "--output=~/picture.png")
    invoke("average", "~/x/run", "--last", "2", "--output=~/mean")
    assert {"picture.png", "mean", "x"} == {path.name for path in home.iterdir() if path.name[0] != "."}
    assert not list(home.parent.glob("~*"))
    done = CliRunner().invoke(main.app, ["status", "~nobody99/x"])
    assert done.exit_code == 2
    assert "~nobody99 has no home folder here" in done.stderr
