"""Compiled code of a run: evaluations and other row lengths cost none of it, ranks have that of one process, and what
falls back is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.process import COUNTING
from tests.helpers.ranks import Ranks
from tests.helpers.runs import launched, run
from tests.helpers.tiny import ROW, ROWS, losses, write_config

HALF = 3


def config(folder: Path, data: Path, **changes: Any) -> str:
    """Two phases of HALF steps, the second of rows twice as long; an evaluation after every second step."""
    phase = {"name": "short", "tokens": HALF * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    longer = {"name": "long", "tokens": HALF * ROWS * ROW, "max_seq_len": 2 * ROW, "global_batch_size": ROWS // 2}
    changes = {"phases": [phase, longer], "imports": [COUNTING], "evaluation": {"max_rows": 3}} | changes
    changes["trainer"] = {"log_interval": 1, "compile": True} | changes.get("trainer", {})
    return str(write_config(folder, data, 2 * HALF, **changes))


def trained(ranks: Ranks, world_size: int, folder: Path, data: Path, **changes: Any) -> list[list[Any]]:
    """What rank 0 compiled and ran."""
    file = config(folder, data, **changes)
    codes, text = ranks.run(world_size, "train", file, extra={"COUNTS": str(folder)})
    assert codes == [0] * world_size, text
    return json.loads((folder / "0.json").read_text())


def compiled(events: list[list[Any]]) -> list[Any]:
    return [shape for what, shape in events if what == "compiled"]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(ranks, 1, folder, tiny_data)


def test_evaluations_and_exports_compile_nothing(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, alone: tuple[Path, list[list[Any]]]
) -> None:
    """Row lengths, row counts and modes that training never sees go through the blocks in between."""
    often = {"interval": 2 * ROWS * ROW, "max_rows": 3, "max_seq_len": ROW // 2}
    events = trained(ranks, 1, tmp_path, tiny_data, evaluation=often)
    assert len(compiled(events)) == len(compiled(alone[1])) > 0
    assert len(events) == len(alone[1])  # and every training step runs its compiled code


def test_a_new_row_length_keeps_training_compiled(alone: tuple[Path, list[list[Any]]]) -> None:
    """The same tokens at a time: the second phase has compiled code, and as much is run in each of its steps."""
    ran = [shape for what, shape in alone[1] if what == "ran"]
    assert len(ran) >= 2 * HALF
    assert len(ran) % (2 * HALF) == 0


def test_compiled_losses_are_those_of_eager(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, alone: tuple[Path, list[list[Any]]]
) -> None:
    events = trained(ranks, 1, tmp_path, tiny_data, trainer={"compile": False})
    assert events == []
    assert losses(alone[0]) == pytest.approx(losses(tmp_path), rel=1e-5)


# Traced under a launcher; compiled to the end. tests/training/test_processes.py has every launcher.
INDUCTOR = [pytest.param("forked", name, "inductor", marks=pytest.mark.long) for name in ("ddp", "fsdp2")]
CASES = [("composer", "fsdp2", "traced"), *INDUCTOR]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "parallelism", "how"), CASES)
def test_launched_ranks_keep_their_compiled_code_and_the_losses_of_one_process(
    launcher: str,
    parallelism: str,
    how: str,
    ranks: Ranks,
    tiny_data: Path,
    tmp_path: Path,
    alone: tuple[Path, list[list[Any]]],
) -> None:
    """With evaluations of three other shapes in between, and a second phase of another row length."""
    often = {"interval": 2 * ROWS * ROW, "max_rows": 3, "max_seq_len": ROW // 2}
    file = config(tmp_path, tiny_data, evaluation=often, trainer={"parallelism": parallelism})
    extra = {"COUNTS": str(tmp_path)} | ({"INDUCTOR": "1"} if how == "inductor" else {})
    if launcher == "forked":
        text = ranks.train(2, file, extra=extra)
    else:
        done = run(launched(2, "train", file), timeout=500, extra=extra)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
    assert losses(tmp_path)[: 2 * HALF] == pytest.approx(losses(alone[0])[: 2 * HALF], rel=1e-5)
    assert "FALLS BACK TO EAGER" not in text
    for number in range(2):
        events = json.loads((tmp_path / f"{number}.json").read_text())
        # Half of the rows are another size of a microbatch: the kinds of blocks are the same.
        assert len(compiled(events)) == len(compiled(alone[1]))
        assert sum(what == "ran" for what, _ in events) == sum(what == "ran" for what, _ in alone[1])


@pytest.mark.slow
def test_ddp_cuts_no_graph(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Of blocks over the 1 MB of its first bucket."""
    wide = {"hidden_size": 256, "intermediate_size": 512}
    one, two = (len(compiled(trained(ranks, n, tmp_path / str(n), tiny_data, model=wide))) for n in (1, 2))
    assert one == two > 0


def test_a_fall_back_to_eager_is_said(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """A limit too low for the run, set from outside: it goes on, and says so once."""
    low = tmp_path / "low.py"
    low.write_text(
        "import training.compiling as c\nfrom torch._dynamo import config\n"
        "real = c.compile_blocks\n"
        "def few(model, sizes):\n    real(model, sizes)\n    config.recompile_limit = 2\n"
        "import training.run\ntraining.run.compile_blocks = few\n"
    )
    file = config(tmp_path, tiny_data, imports=[COUNTING, str(low)])
    codes, text = ranks.run(1, "train", file, extra={"COUNTS": str(tmp_path)})
    assert codes == [0], text
    assert text.count("TRAINING FALLS BACK TO EAGER") == 1
