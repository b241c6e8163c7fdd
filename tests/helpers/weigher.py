"""An evaluation for tests, registered by a run's or an eval file's `imports`: it costs nothing and tells weights apart."""

import time
from pathlib import Path

from pydantic import Field
from safetensors.torch import load_file

from evals.interface import EVALS, Eval, EvalConfig, Model, Scores
from evals.models import plain
from flexbert_core.schema import RunError


@EVALS.register("weigher")
class Weigher(Eval):
    """The mean absolute weight of the token table."""

    class Config(EvalConfig):
        seconds: float = Field(0.0, ge=0, description="to take")
        refuses: str = Field("", description="fails for models whose label holds this")
        count_in: str = Field(description="folder where each run of this leaves a file")

    def run(self, model: Model, out: Path) -> Scores:
        (Path(self.config.count_in) / f"{plain(model.label)}-{time.time_ns()}").touch()
        time.sleep(self.config.seconds)
        if self.config.refuses and self.config.refuses in model.label:
            raise RunError("refused")
        weights = load_file(model.folder / "model.safetensors")
        (table,) = (tensor for name, tensor in weights.items() if name.endswith("tok_embeddings.weight"))
        return {"weight": table.abs().mean().item()}
