"""An algorithm from outside the project: gradients of matrices lose their mean (arXiv 2004.01461).

imports: [centred_gradients.py]
algorithms: [{name: centred_gradients, share: 1.0}]
"""

from pathlib import Path

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from pydantic import Field

from flexbert_core.schema import Component
from recipe.phases import PhasePlan
from recipe.slots import ALGORITHMS


@ALGORITHMS.register("centred_gradients")
class CentredGradients(Algorithm):
    """Takes `share` of its mean from each row of each matrix's gradient, before the optimizer sees it. A row is whole
    on its rank, also under FSDP2."""

    class Config(Component):
        share: float = Field(1.0, ge=0, le=1, description="of the mean that is taken away")

    def __init__(self, config: Config, *, plan: PhasePlan, folder: Path) -> None:
        self.share = config.share

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH  # the gradients of all microbatches and ranks are there

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for parameter in state.model.parameters():
            if parameter.ndim > 1 and parameter.grad is not None:
                parameter.grad.sub_(parameter.grad.mean(dim=1, keepdim=True), alpha=self.share)
