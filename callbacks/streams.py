"""Training loss and masked accuracy of each stream of the mixture."""

import math
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor

import ranks
from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge


class StreamScores(Gauge):
    """Sums what the loss knows of every masked token anyway: no logits, no host sync but when a line is written.

    | logged | unit | event, interval |
    |---|---|---|
    | masked_accuracy | share of masked tokens whose target scores best (ties count), since the last line | AFTER_LOSS |
    | streams.NAME.loss | nats per masked token (plain cross entropy) of the stream's, since the last line | same |
    | streams.NAME.masked_accuracy, .masked_tokens | the same of the stream; their number | same |

    A stream without masked tokens in the window is left out. Steps that were not applied (a loss that is not finite)
    are not counted. A loss component that does not fill in its scores has null here, and of an objective without scores
    nothing is logged. Dropout is on: the same text scores better in evaluation.
    """

    def __init__(self, clock: Clock, stream_names: list[str]) -> None:
        super().__init__(clock)
        self.stream_names = stream_names
        self._reduced = self._zeros("cpu")  # over ranks
        self._local: Tensor | None = None  # this rank's since the last reduction
        self._step: Tensor | None = None  # this rank's of the step under way

    def _zeros(self, device: str | torch.device) -> Tensor:
        return torch.zeros(3, len(self.stream_names), dtype=torch.float64, device=device)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._step = None  # Composer begins a step anew when it was out of memory

    def after_loss(self, state: State, logger: Logger) -> None:
        scores = state.outputs.scores  # pyright: ignore[reportAttributeAccessIssue]
        if scores is None:
            return
        losses, hits = scores
        streams = state.batch["masked_streams"].long()
        if self._step is None:
            self._step = self._zeros(losses.device)
        # A product and not index_add_, which on CUDA adds in another order each time.
        of_stream = streams[:, None] == torch.arange(len(self.stream_names), device=streams.device)
        self._step += torch.stack([losses, hits, torch.ones_like(losses)]).double() @ of_stream.double()

    def take_in(self, state: State) -> None:
        if self._step is not None and math.isfinite(float(state.total_loss_dict["loss/train/total"])):
            self._local = self._step if self._local is None else self._local + self._step
        self._step = None

    def read(self, state: State, window: Window) -> dict[str, Any]:
        self._reduce()
        rows = zip(self.stream_names, self._reduced.T.tolist(), strict=True)
        streams = {name: _means(*sums) for name, sums in rows if sums[2]}
        accuracy = _means(*self._reduced.sum(1).tolist())["masked_accuracy"] if streams else None
        self._reduced = self._zeros("cpu")
        return {"masked_accuracy": accuracy, "streams": streams} if streams else {}

    def state_dict(self) -> dict[str, Any]:
        self._reduce()
        return {"sums": self._reduced.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reduced, self._local = torch.tensor(state["sums"], dtype=torch.float64), None

    def _reduce(self) -> None:
        self._reduced = self._reduced + ranks.over_ranks(self._zeros("cpu") if self._local is None else self._local)
        self._local = None


def _means(loss: float, hits: float, count: float) -> dict[str, Any]:
    known = math.isfinite(loss)  # a loss that does not fill in its scores leaves NaN
    means = {"loss": loss / count if known else None, "masked_accuracy": hits / count if known else None}
    return {**means, "masked_tokens": int(count)}
