"""Slots `callbacks`, `algorithms` and `loggers`: Composer's own by the name of their class, TensorBoard and wandb."""

import inspect
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component
from recipe.slots import ALGORITHMS, CALLBACKS, LOGGERS


class _OfComposer(Component):
    """A class of Composer's, with its own arguments."""

    name: Literal["composer"] = "composer"
    class_name: str = Field(alias="class", description="name of the class in Composer, such as SpeedMonitor")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the class, as plain values")

    def find(self) -> type:
        """The class. Raises ValueError when Composer has none of that name."""
        raise NotImplementedError

    def build(self) -> Any:
        """An instance. Raises ValueError when the class refuses its arguments."""
        try:
            return self.find()(**self.arguments)
        except (TypeError, ValueError, AssertionError, ImportError) as error:
            raise ValueError(f"arguments: {self.class_name}: {' '.join(str(error).split())}") from None

    @model_validator(mode="after")
    def _check_arguments(self) -> "_OfComposer":
        parameters = inspect.signature(self.find()).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        for argument in self.arguments:
            if argument not in parameters and not takes_any:
                raise ValueError(
                    f"arguments: {self.class_name} has no {argument!r}, {did_you_mean(argument, parameters)}"
                )
        return self


def _find(module: Any, base: type, name: str) -> type:
    known = {key: value for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    if name not in known:
        raise ValueError(f"class: Composer has no {base.__name__.lower()} {name!r}, {did_you_mean(name, known)}")
    return known[name]


@CALLBACKS.register("composer")
class ComposerCallback:
    """A callback of Composer's: `{name: composer, class: SpeedMonitor, arguments: {window_size: 10}}`."""

    class Config(_OfComposer):
        def find(self) -> type:
            from composer import callbacks
            from composer.core import Callback

            return _find(callbacks, Callback, self.class_name)

    def __new__(cls, config: Config, **runtime: Any) -> Any:
        return config.build()


@ALGORITHMS.register("composer")
class ComposerAlgorithm:
    """An algorithm of Composer's: `{name: composer, class: GradientClipping, arguments: {...}}`."""

    class Config(_OfComposer):
        def find(self) -> type:
            from composer import algorithms
            from composer.core import Algorithm

            return _find(algorithms, Algorithm, self.class_name)

    def __new__(cls, config: Config, **runtime: Any) -> Any:
        return config.build()


@LOGGERS.register("composer")
class ComposerLogger:
    """A logger of Composer's: `{name: composer, class: MLFlowLogger, arguments: {...}}`."""

    class Config(_OfComposer):
        def find(self) -> type:
            from composer import loggers

            return _find(loggers, loggers.LoggerDestination, self.class_name)

    def __new__(cls, config: Config, **runtime: Any) -> Any:
        return config.build()


@LOGGERS.register("tensorboard")
class TensorBoard:
    """TensorBoard, in RUN/tensorboard."""

    class Config(Component):
        flush_interval: int = Field(1000, ge=1, description="steps between writes to disk")

    def __new__(cls, config: Config, *, folder: Path, **runtime: Any) -> Any:
        from composer.loggers import TensorboardLogger

        return TensorboardLogger(log_dir=str(folder / "tensorboard"), flush_interval=config.flush_interval)


@LOGGERS.register("wandb")
class WandB:
    """Weights & Biases; a resumed run goes on in the same place there."""

    class Config(Component):
        project: str = Field(description="project the run appears in")
        entity: str | None = Field(default=None, description="team or user; default: the account's")
        mode: Literal["online", "offline"] = Field(default="online", description="offline: sync later")

    def __new__(cls, config: Config, *, name: str, run: dict[str, Any], folder: Path) -> Any:
        from composer.loggers import WandBLogger

        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("WANDB_SILENT", "true")
        return WandBLogger(
            project=config.project,
            entity=config.entity,
            name=name,
            rank_zero_only=True,
            init_kwargs={"mode": config.mode, "id": name, "resume": "allow", "config": run},
        )
