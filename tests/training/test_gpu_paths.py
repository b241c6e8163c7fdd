"""What a CPU can tell of a step on a GPU: no kernel and no operation whose sums have no order, and no wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.trainer import trainer as composer_trainer
from optimi import StableAdamW
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.clock import Clock, Window
from callbacks.ledger import Ledger
from callbacks.loss_parts import LossParts
from callbacks.watchdog import Watchdog
from flexbert import build
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.packed import check_packed
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.slots import OPTIMIZERS
from tests.helpers import flash
from tests.helpers.models import batch_of, tiny
from tests.helpers.tiny import ROW, ROWS, write_config
from tests.helpers.waits import Waits
from training.compiling import eagerly
from training.objectives import Loss
from training.run import Run

FLASH = {"attention": {"name": "multihead", "global_attn_every_n_layers": 3, "backend": "flash2", "out_dropout": 0.1}}


@contextmanager
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sources of the kernels that are launched; they do not run."""
    from triton.runtime.jit import JITFunction

    sources: list[str] = []

    def launch(self: Any, *_: Any, **__: Any) -> None:
        sources.append(self.src)

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        for name in ("_exchange_device", "_maybe_exchange_device"):  # they need a driver
            patch.setattr(torch.cuda, name, lambda index: index)
        yield sources


def step_on_cuda(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Two updates of a model whose parameters are said to be on a CUDA device: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((24, 16), (16, 16), (16,))]
        model = torch.nn.Module()
        model.weights = torch.nn.ParameterList(parameters)
        optimizer = make(model)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()


def test_what_a_kernel_of_atomic_sums_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-optimi's own StableAdamW has one: so two runs of one seed ended with other bits on an H100."""
    with triton_kernels(monkeypatch) as sources:
        step_on_cuda(lambda model: StableAdamW(model.parameters(), lr=0.1, triton=True))
    assert any("tl.atomic" in source for source in sources)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
def test_no_optimizer_reaches_a_kernel_of_atomic_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with triton_kernels(monkeypatch) as sources:
        step_on_cuda(lambda model: OPTIMIZERS.build(OPTIMIZERS.parse(name), model=model, lr=0.1))
    assert [source for source in sources if "tl.atomic" in source] == []


# Operations of which torch says that they add up in no order on CUDA, by torch.use_deterministic_algorithms: the ones
# that add to places by index have one where no place comes twice.
INDEXED = {"index_add": 2, "index_add_": 2, "index_put": 1, "index_put_": 1, "_index_put_impl_": 1, "scatter_add": 2}
INDEXED |= {"scatter_add_": 2, "put_": 1, "index_copy": 2, "index_copy_": 2, "scatter": 2}
UNORDERED = (
    "histc",
    "kthvalue",
    "median",
    "nll_loss2d_forward",
    "grid_sampler_2d_backward",
    "_embedding_bag_dense_backward",
)
UNORDERED += ("upsample_linear1d_backward", "upsample_bilinear2d_backward", "reflection_pad1d_backward", "cumsum")
UNORDERED += ("adaptive_avg_pool2d_backward", "max_pool3d_with_indices_backward", "_ctc_loss_backward", "bincount")


def has_twice(name: str, args: Any) -> bool:
    """Whether a place is added to twice."""
    given = args[INDEXED[name]]
    if name.startswith("scatter"):  # an index for each element, along one dimension
        places = list(torch.meshgrid(*(torch.arange(size) for size in given.shape), indexing="ij"))
        places[args[1]] = given
    else:
        places = [each for each in (given if isinstance(given, (list, tuple)) else [given]) if each is not None]
    keys = torch.stack(torch.broadcast_tensors(*(each.long() for each in places)), -1).reshape(-1, len(places))
    return len(keys.unique(dim=0)) != len(keys)


class Unordered(TorchDispatchMode):
    """Lists them, where it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        is_float = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        if name in INDEXED and is_float:
            if has_twice(name, args):
                self.found.append(name)
        elif name in UNORDERED and is_float:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


CASES: dict[str, dict[str, Any]] = {
    "rope": {},
    "alibi": {"position": "alibi"},
    "learned": {"position": "learned", "embedding": {"name": "tokens", "token_types": 2}},
    "sinusoidal": {"position": {"name": "sinusoidal", "learned_scale": True}},
    "shared heads": {"attention": {**FLASH["attention"], "num_key_value_heads": 1, "qk_norm": "rmsnorm"}},
}


@pytest.mark.parametrize("case", CASES)
def test_no_operation_of_a_step_adds_up_in_no_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install(monkeypatch)
    model = build(tiny(**{**FLASH, **CASES[case]}))
    ids, bounds, longest, _ = batch_of((40, 1, 23))
    labels = torch.where(torch.arange(64) % 3 == 0, ids, -100)
    types = torch.arange(64) % 2 if case == "learned" else None
    with Unordered() as step, keyed_dropout(TokenKeys(0, 0, bounds, len(ids))):
        loss = model(ids, bounds, longest, labels=labels, token_type_ids=types, num_masked=22).loss
        assert loss is not None
        loss.backward()
    assert "embedding_dense_backward" in step.seen  # backward was seen, too; on CUDA it sorts
    assert step.found == []


def test_an_index_that_comes_twice_is_seen() -> None:
    weights = torch.ones(4, 2, requires_grad=True)
    for index, found in ((torch.tensor([2, 0]), []), (torch.tensor([2, 2]), ["index_add_"])):
        with Unordered() as step:
            weights.index_select(0, index).sum().backward()
        assert [name.rstrip("_") for name in step.found] == [name.rstrip("_") for name in found]


class Heard(Callback):
    """Waits of a run, from before a microbatch's forward to after its backward."""

    def __init__(self, models: int) -> None:
        """models: that each look at the batch."""
        self.models, self.microbatches = models, list[list[str]]()
        self._checks, self._of_microbatch = Waits(), Waits()

    def before_forward(self, state: State, logger: Logger) -> None:
        batch = state.batch
        with Waits() as self._checks:
            check_packed(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"])
        self._of_microbatch = Waits("lift_fresh")
        self._of_microbatch.__enter__()

    def after_backward(self, state: State, logger: Logger) -> None:
        self._of_microbatch.__exit__(None, None, None)
        for name in self._checks.found * self.models:
            self._of_microbatch.found.remove(name)
        self.microbatches.append(self._of_microbatch.found)


def heard(data: Path, folder: Path, rows: int, objective: Any = "mlm") -> Heard:
    """Of a real run of three steps with so many rows in a microbatch, each with eight empty slots, set up for compiled
    blocks; they run as they are written."""
    phase: dict[str, Any] = {
        "name": "all",
        "tokens": 3 * ROWS * (ROW + 8),
        "max_seq_len": ROW + 8,
        "global_batch_size": ROWS,
        "lr": 1e-2,
        "objective": objective,
    }
    trainer = {"microbatch_size": rows, "log_interval": 1000, "compile": True}
    changes = {"model": {"attention": FLASH["attention"]}, "checkpoint": {"interval": 1000 * ROWS * ROW}}
    file = write_config(folder, data, 3, "full", "sparse", trainer=trainer, phases=[phase], **changes)
    config = load_run_config(file)
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        run.open()
        found = Heard(models=1 if objective == "mlm" else 2)
        run.trainer.state.callbacks.append(found)
        try:
            with eagerly():
                run.fit(run.resume())
        finally:
            run.close()
    return found


def test_no_microbatch_of_a_run_waits_for_the_device(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what Composer has moved to the device to the end of backward: checks of a batch's values are made on the CPU
    only, and counted by a batch like it."""
    flash.install(monkeypatch)
    one, four = (heard(tiny_data, tmp_path / str(rows), rows) for rows in (ROWS, ROWS // 4))
    assert [len(each.microbatches) for each in (one, four)] == [3, 12]
    for found in (one, four):
        for microbatch in found.microbatches:
            assert microbatch == ["lift_fresh"]  # AttentionPlan.longest, which stays on the host


def test_parts_of_a_loss_are_counted_without_a_wait(tiny_data: Path, tmp_path: Path) -> None:
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 1)))
    gauge = LossParts(Clock(1, Ledger(tmp_path / "ledger.jsonl", []), plan), ["a", "b"])
    parts = [{"a": (torch.tensor(6.0), 2), "b": (torch.tensor(5.0), 0)}, {"a": (torch.tensor(3.0), 4)}]
    states: list[Any] = [SimpleNamespace(outputs=Loss(torch.tensor(1.0), 1, parts=each)) for each in parts]
    logger: Any = None
    with Waits("lift_fresh") as waits:
        for state in states:
            gauge.after_loss(state, logger)
    assert waits.found == []
    ended: Any = SimpleNamespace(total_loss_dict={"loss/train/total": 1.0})
    gauge.take_in(ended)
    assert gauge.read(ended, cast(Window, None)) == {"parts": {"a": 9.0 / 6}}


@pytest.mark.slow
def test_nor_does_one_whose_loss_has_parts(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install(monkeypatch)
    found = heard(tiny_data, tmp_path, ROWS // 2, {"name": "rtd", "generator": {"num_hidden_layers": 1}})
    assert found.microbatches == [["lift_fresh"] * 2] * 6  # plans of the generator's and of the model's


def test_products_of_float32_are_float32s(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Composer's device for GPUs sets, which its Trainer makes: TF32 has 10 bits of mantissa."""
    real = composer_trainer.get_device  # pyright: ignore[reportPrivateImportUsage]

    def as_for_a_gpu(device: Any) -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        return real(device)

    monkeypatch.setattr(composer_trainer, "get_device", as_for_a_gpu)
    config = load_run_config(write_config(tmp_path, tiny_data, 1))
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        try:
            run.open()
            assert not torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.set_float32_matmul_precision("highest")
            run.close()
