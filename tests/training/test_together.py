"""Callbacks as one, events without ceremony, and what the step guard asks of gradients."""

import math
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, Event
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from torch.utils.data import DataLoader

from callbacks.guards import _not_finite
from callbacks.together import Together, without_ceremony


class _Told(Callback):
    def __init__(self, name: str, told: list[tuple[str, str]]) -> None:
        self.name, self.told = name, told

    def batch_end(self, state: Any, logger: Any) -> None:
        self.told.append((self.name, "batch_end"))

    def close(self, state: Any, logger: Any) -> None:
        self.told.append((self.name, "close"))
        if self.name == "second":
            raise OSError("a full disk")

    def post_close(self) -> None:
        self.told.append((self.name, "post_close"))


class _Starts(_Told):
    def batch_start(self, state: Any, logger: Any) -> None:
        self.told.append((self.name, "batch_start"))


def test_each_is_told_in_order_what_it_listens_to() -> None:
    told: list[tuple[str, str]] = []
    together: Any = Together([_Told("first", told), _Starts("second", told), _Told("third", told)])
    for event in (Event.INIT, Event.BATCH_START, Event.BEFORE_FORWARD, Event.BATCH_END):
        together.run_event(event, None, None)
    assert told == [("second", "batch_start"), *((name, "batch_end") for name in ("first", "second", "third"))]


def test_all_are_closed_whatever_one_raises() -> None:
    told: list[tuple[str, str]] = []
    together: Any = Together([_Told(name, told) for name in ("first", "second", "third")])
    with pytest.raises(OSError, match="a full disk"):
        together.close(None, None)
    together.post_close()
    assert told == [(name, event) for event in ("close", "post_close") for name in ("first", "second", "third")]


class _Line(ComposerModel):
    """A linear model, the least that Composer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


def test_composer_tells_the_same_in_the_same_order_with_and_without_ceremony() -> None:
    """Of a real trainer: before, in and after two steps, and at its end."""
    found, own = [], []
    for plain in (False, True):
        told: list[tuple[str, str]] = []
        logged: list[str] = []

        class Tells(Callback):
            def run_event(self, event: Event, state: Any, logger: Any, told: Any = told) -> None:
                told.append((type(self).__name__, event.value))

        class Logs(Tells, LoggerDestination):
            def log_metrics(self, metrics: dict[str, Any], step: int | None = None, logged: Any = logged) -> None:
                logged.extend(metrics)

        trainer = Trainer(
            model=_Line(),
            train_dataloader=DataLoader(torch.ones(4, 2), batch_size=2),  # pyright: ignore[reportArgumentType]
            max_duration="2ba",
            callbacks=[Tells()],
            loggers=[Logs()],
            progress_bar=False,
            device="cpu",
        )
        (without_ceremony(trainer) if plain else trainer).fit()
        trainer.engine.logger.log_metrics({"ours": 1.0})
        trainer.close()
        own.append(logged)
        found.append([event for event in told if event[1] != "init"])
    assert found[0] == found[1]
    assert {name for name, _ in found[0]} == {"Tells", "Logs"}
    assert sum(event == "batch_end" for _, event in found[0]) == 4
    assert len(own[0]) > 10
    assert own[1] == ["ours"]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("value", [1.0, 0.0, math.inf, -math.inf, math.nan, 1e30])
def test_one_value_of_one_gradient_decides(shape: tuple[int, ...], value: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((4, 6), shape, (3,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gradient = parameters[1].grad
    assert gradient is not None
    if gradient.numel():
        gradient.view(-1)[-1] = value
    found = bool(_not_finite(1.0, torch.optim.SGD(parameters, lr=1.0)))
    # 1e30 squared overflows float32
    assert found == (gradient.numel() > 0 and value not in (0.0, 1.0))
