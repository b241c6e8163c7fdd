"""Gradient clipping acts on the true global norm: that of the global batch's gradient over all parameters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.helpers.synthetic_runs import RUN, run_config, write_dataset
from training import trainer


class Spy:
    """What each step begins with, and the gradients that its optimizer used."""

    def __init__(self, run: trainer.Run) -> None:
        self.run = run
        self.steps: list[tuple[nn.Module, Any, dict[str, Tensor]]] = []
        self.depth = 0  # torch runs the hooks of a step, and again of its base class's once that had an instance
        run.optimizer.register_step_pre_hook(self.before)
        run.optimizer.register_step_post_hook(self.after)

    def before(self, *arguments: Any) -> None:
        # The gradients come inside the step: Composer's closure computes them.
        self.depth += 1
        if self.depth > 1:
            return
        self.steps.append((copy.deepcopy(self.run.model), copy.deepcopy(self.run.trainer.state.batch), {}))

    def after(self, *arguments: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        for name, parameter in self.run.model.named_parameters():
            assert parameter.grad is not None
            self.steps[-1][2][name] = parameter.grad.clone()


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_the_norm_is_that_of_the_global_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """Microbatches of 3 of 8 rows, with different numbers of masked tokens, against one backward over the whole."""
    spies = []
    opened = trainer.Run.open

    def open_with_a_spy(run: trainer.Run) -> None:
        opened(run)
        spies.append(Spy(run))

    monkeypatch.setattr(trainer.Run, "open", open_with_a_spy)
    settings = [f"trainer.gradient_clip_norm={limit}", "trainer.microbatch_size=3", "phases.0.tokens=2K"]
    model = {**RUN["model"], "attention": "multihead"}  # without dropout
    config = run_config(tmp_path, write_dataset(tmp_path / "data"), "clip", *settings, model=model)
    trainer.train(config, Console(quiet=True))
    (spy,) = spies
    assert len(spy.steps) == 4
    for before, batch, used in spy.steps:
        before(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"], labels=batch["labels"]).loss.backward()
        gradients = {name: parameter.grad.double() for name, parameter in before.named_parameters()}
        norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
        assert 0.1 < norm < 100
        factor = min(1.0, limit / norm)
        for name, gradient in gradients.items():
            torch.testing.assert_close(used[name].double(), gradient * factor, rtol=1e-4, atol=1e-6 * factor)
        total = float(torch.stack([gradient.double().square().sum() for gradient in used.values()]).sum().sqrt())
        assert total == pytest.approx(min(limit, norm), rel=1e-5)
