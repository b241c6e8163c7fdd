"""Runs of several ranks: DDP and FSDP2 train the same, save for any number of ranks, and start by every launcher."""

import functools
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbert_core.schema import Component, ConfigError
from recipe.config import load_run_config
from recipe.slots import OPTIMIZERS
from tests.helpers.ranks import Ranks
from tests.helpers.runs import command, run
from tests.helpers.tiny import SAVED, STEPS, check_same, forget_after, losses, tensors, write_config


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a run of one process with an optimizer, which is trained when first asked for."""

    @functools.cache
    def folder_of(optimizer: str) -> Path:
        folder = tmp_path_factory.mktemp(optimizer)
        ranks.train(1, str(write_config(folder, tiny_data, STEPS, optimizer=optimizer)))
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("world_size", "optimizer", "options"),
    [
        pytest.param(4, "stableadamw", {"parallelism": "ddp"}, marks=pytest.mark.slow),
        (2, "stableadamw", {"parallelism": "fsdp2", "activation_checkpointing": 1, "microbatch_size": 1}),
        pytest.param(
            4, "stableadamw", {"parallelism": {"name": "fsdp2", "reshard_after_forward": False}}, marks=pytest.mark.slow
        ),
        pytest.param(2, "adamw", {"parallelism": "fsdp2"}, marks=pytest.mark.slow),
        pytest.param(2, "decoupled_adamw", {"parallelism": "fsdp2"}, marks=pytest.mark.slow),
        pytest.param(2, "muon", {"parallelism": "fsdp2"}, marks=pytest.mark.slow),
        pytest.param(1, "adamw", {"parallelism": "fsdp2"}, marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one(
    ranks: Ranks,
    tiny_data: Path,
    straight: Callable[[str], Path],
    tmp_path: Path,
    world_size: int,
    optimizer: str,
    options: dict[str, Any],
) -> None:
    config = write_config(tmp_path, tiny_data, STEPS, optimizer=optimizer, trainer=options)
    ranks.train(world_size, str(config))
    check_same(tmp_path, straight(optimizer))


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        pytest.param((2, "ddp"), (1, "ddp"), marks=pytest.mark.slow),
        pytest.param((4, "ddp"), (2, "ddp"), marks=pytest.mark.slow),
        ((1, "ddp"), (2, "fsdp2")),
        pytest.param((4, "fsdp2"), (2, "fsdp2"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (1, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (4, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp2"), (4, "fsdp2"), marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on(
    ranks: Ranks,
    tiny_data: Path,
    straight: Callable[[str], Path],
    tmp_path: Path,
    saved: tuple[int, str],
    resumed: tuple[int, str],
) -> None:
    file = write_config(tmp_path, tiny_data, STEPS)
    if saved == (1, "ddp"):
        shutil.copytree(straight("stableadamw") / "run", tmp_path / "run")
        (tmp_path / "run" / "config.yaml").unlink()  # it names the folder that it was copied from
    else:
        ranks.train(saved[0], str(file), f"trainer.parallelism={saved[1]}")
    forget_after(tmp_path, SAVED)
    before = tensors(tmp_path, SAVED)
    text = ranks.train(resumed[0], str(file), f"trainer.parallelism={resumed[1]}")
    assert f"resuming after step {SAVED}" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path, SAVED).items())
    check_same(tmp_path, straight("stableadamw"))


@pytest.mark.slow
def test_bf16_on_the_cpu_is_the_same_for_both(
    ranks: Ranks, tiny_data: Path, straight: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("ddp", "fsdp2"):
        options = {"precision": "amp_bf16", "parallelism": name}
        ranks.train(2, str(write_config(tmp_path / name, tiny_data, STEPS, trainer=options)))
    assert losses(tmp_path / "ddp") == pytest.approx(losses(tmp_path / "fsdp2"), rel=1e-5)
    exact = losses(straight("stableadamw"))
    assert losses(tmp_path / "ddp") == pytest.approx(exact, rel=1e-2)
    assert losses(tmp_path / "ddp") != pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["composer", "torchrun"])
def test_launchers(tiny_data: Path, straight: Callable[[str], Path], tmp_path: Path, launcher: str) -> None:
    file = write_config(tmp_path, tiny_data, 2, trainer={"log_interval": 1, "parallelism": "fsdp2"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = {
        "composer": ["-n", "2", "--master_port", port],
        "torchrun": ["--nproc-per-node", "2", "--master-port", port],
    }
    program = str(Path(sys.executable).parent / launcher)
    done = run([program, *options[launcher], *command("train", str(file))[1:]])
    assert done.returncode == 0, done.stderr + done.stdout
    assert losses(tmp_path)[:2] == pytest.approx(losses(straight("stableadamw"))[:2], rel=1e-5)


@pytest.mark.slow
def test_blocks_gathered_in_bf16_train_nearly_the_same(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Weights of norms are rounded besides. In microbatches: sums of gradients wait for the last, in float32."""
    found = []
    for name, way in (("ddp", "ddp"), ("bf16", {"name": "fsdp2", "gather": "bf16"})):
        options = {"precision": "amp_bf16", "parallelism": way, "microbatch_size": 1, "log_interval": 1}
        file = write_config(tmp_path / name, tiny_data, STEPS, trainer=options, model={"norm": "rmsnorm"})
        ranks.train(2, str(file))
        found.append(losses(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_gathering_in_bf16_is_refused_where_it_cannot_be(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    way = {"name": "fsdp2", "gather": "bf16"}
    for precision, words in (("fp32", "the run computes in float32"), ("amp_bf16", "takes no bfloat16 weights")):
        trainer = {"precision": precision, "parallelism": way}
        codes, text = ranks.run(1, "train", str(write_config(tmp_path / precision, tiny_data, 1, trainer=trainer)))
        assert codes == [2]
        assert words in text


def test_what_fsdp2_cannot_do_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    class Whole:
        class Config(Component):
            pass

    with pytest.raises(
        ConfigError,
        match=r"train\.yaml: trainer\.microbatch_size: auto cannot go with parallelism fsdp2.*number of rows$",
    ):
        load_run_config(
            write_config(tmp_path, tiny_data, 1, trainer={"parallelism": "fsdp2", "microbatch_size": "auto"})
        )
    OPTIMIZERS.register("whole")(Whole)
    try:
        file = write_config(tmp_path, tiny_data, 1, optimizer="whole", trainer={"parallelism": "fsdp2"})
        with pytest.raises(
            ConfigError, match=r"fsdp2 leaves each rank a part.*'whole' needs them whole: use ddp, or one of adamw, "
        ):
            load_run_config(file)
        assert load_run_config(file, ["trainer.parallelism=ddp"]).optimizer.name == "whole"
    finally:
        del OPTIMIZERS.entries["whole"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parallelism": "fsdp"},
            "trainer.parallelism: unknown parallelism 'fsdp', did you mean 'fsdp2'?; a part of yours needs its file in imports",
        ),
        ({"microbatch_size": 0}, "trainer.microbatch_size: expected a number of rows, 1 or more, or auto, got 0"),
        (
            {"microbatch_size": "automatic"},
            "trainer.microbatch_size: expected a number of rows, 1 or more, or auto, got 'automatic'",
        ),
    ],
)
def test_config_faults(tiny_data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write_config(tmp_path, tiny_data, 1, trainer=options))
    assert str(error.value).endswith(f"train.yaml: {message}")
