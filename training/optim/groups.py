"""Which parameters an optimizer treats alike: what decays, by how much, and whose learning rate differs by a factor."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from flexbert_core.schema import Component, ConfigError, Schema

Decayed = Literal["matrices", "no_embeddings", "all"]


class GroupConfig(Schema):
    """Parameters with settings of their own."""

    match: str = Field(
        min_length=1,
        description="names of parameters as in a checkpoint, * for any part: `encoder.embedding.*`, `*.bias`",
    )
    lr_factor: float = Field(
        default=1.0, ge=0, description="their learning rate over the phase's; 0: they stay as they are"
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="theirs, whatever `decayed` says; default: as without this group"
    )


class GroupsConfig(Component):
    """What every optimizer of ours takes."""

    weight_decay: float = Field(ge=0)  # default and meaning are each entry's own
    decayed: Decayed = Field(
        default="matrices",
        description="what decays: matrices (BERT, ModernBERT), those that are no embeddings, or all, vectors too",
    )
    groups: list[GroupConfig] = Field(
        default=[], description="parameters with settings of their own; the first group that matches a name has it"
    )
    scale_lr: Literal["mup"] | None = Field(
        default=None,
        description="mup: matrices that are no embeddings learn at lr * base_hidden_size / hidden_size, so that an lr "
        "tuned on a narrow model fits a wide one (arXiv 2203.03466, table 8; arXiv 2407.05872, table 1: standard "
        "parametrization, Adam)",
    )
    base_hidden_size: int | None = Field(
        default=None, ge=1, description="with scale_lr: the hidden_size of the model that lr was tuned on"
    )

    @property
    def decoupled(self) -> bool:
        """Whether weight_decay is what a step decays by at the phase's peak lr, and so says nothing without it."""
        return False

    @model_validator(mode="after")
    def _check_scaling(self) -> "GroupsConfig":
        if (self.scale_lr is None) != (self.base_hidden_size is None):
            given, missing = ("scale_lr", "base_hidden_size")[:: 1 if self.scale_lr else -1]
            raise ValueError(f"{given}: says nothing without {missing}: give both, or neither")
        return self


# The keys above that say which parameters share a group: a saved state fits no other grouping.
GROUPING = ("decayed", "groups", "scale_lr", "base_hidden_size")


class Settings:
    """Weight decay and factor of the learning rate of every trained parameter of a model."""

    def __init__(self, model: nn.Module, config: GroupsConfig) -> None:
        """Raises ConfigError, starting with the key, for a group that no parameter is in."""
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        self._config = config
        self._width_factor = 1.0
        if config.base_hidden_size is not None:
            self._width_factor = config.base_hidden_size / _hidden_size(model)
        self._check_groups()

    def of(self, parameter: nn.Parameter) -> tuple[float, float]:
        """(weight decay, factor of the learning rate)."""
        config, matrix = self._config, parameter.ndim > 1
        spared = config.decayed == "no_embeddings" and parameter in self._tables
        decay = config.weight_decay if (matrix or config.decayed == "all") and not spared else 0.0
        factor = self._width_factor if matrix and parameter not in self._tables else 1.0
        number = self._group_of(parameter)
        if number is None:
            return decay, factor
        group = config.groups[number]
        return decay if group.weight_decay is None else group.weight_decay, factor * group.lr_factor

    def split(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
        """As an optimizer takes them: each group of the config apart, decayed ones before others, and in the order
        given, so that optimizer states map to names the same way in every process."""
        found: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            number, (decay, factor) = self._group_of(parameter), self.of(parameter)
            order = len(self._config.groups) if number is None else number
            found.setdefault((-order, decay == 0.0, factor != 1.0, decay, factor), []).append(parameter)
        return [
            {"params": params, "weight_decay": key[-2], "lr_factor": key[-1]}
            for key, params in sorted(found.items(), key=lambda item: item[0])
        ]

    def _group_of(self, parameter: nn.Parameter) -> int | None:
        name = self.names[parameter]
        return next((at for at, group in enumerate(self._config.groups) if fnmatchcase(name, group.match)), None)

    def _check_groups(self) -> None:
        taken = {self._group_of(parameter) for parameter in self.names}
        for number, group in enumerate(self._config.groups):
            if number in taken:
                continue
            matched = any(fnmatchcase(name, group.match) for name in self.names.values())
            some = list(self.names.values())[:: max(1, len(self.names) // 4)]
            why = "no parameter has such a name; some are " + ", ".join(some)
            if matched:
                why = "all parameters that it matches are in a group before it"
            raise ConfigError(f"optimizer.groups[{number}].match: {group.match!r}: {why}")


def parameter_groups(model: nn.Module, config: GroupsConfig) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: decayed parameters, others with decay 0, then those of `config.groups`.

    Vectors are norm weights and biases; a decoder tied to the token table is an embedding.
    """
    settings = Settings(model, config)
    return settings.split(settings.names)


def _hidden_size(model: nn.Module) -> int:
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if size is None:
        raise ConfigError("optimizer.scale_lr: this model says no hidden_size: leave scale_lr out")
    return size
