"""Init `grow`: the weights of a larger model, tiled from those of a smaller one of the same architecture.

Width: new[r, c] = old[(r - r0) mod h, (c - c0) mod w], r0 = (H - h) // 2 for tile_center, 0 for tile_edge, for each
part of a fused weight (queries, keys, values; halves of a gated mlp), head by head. Source: ModernBERT (arXiv
2412.13663, sec. 2.3), after Phi. Rescaled, each weight is divided by the number of inputs that copy its own, which
keeps the function exactly where widths are multiples (HyperCloning, arXiv 2409.12903). Measured, 64 channels trained to
a loss of 1.44, grown to 96: 1.44 rescaled, 3.1 not (2026-11-23, tests/flexbert/test_growing.py).

Depth: new layer i is old layer round(i * old / new) (ModernBERT's code, there called Gopher scaling: arXiv 2112.11446),
or the old ones over and over.
"""

import logging
import math
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig
from flexbert.layers import Parts
from flexbert.model import FlexBertForMaskedLM
from flexbert.registry import INITS
from flexbert_core.schema import MAY_CHANGE, Component, ConfigError, UserPath

log = logging.getLogger(__name__)

Method = Literal["tile_center", "tile_edge"]
Depth = Literal["spread", "stack"]
_Facts = set[tuple[str, ...]]  # slot, field, value there, value here


@INITS.register("grow")
class Grow:
    """Starting weights from a smaller model. A head that the source has not (another task's) starts fresh."""

    class Config(Component):
        source: UserPath = Field(
            alias="from",
            description="folder of an export, or a run's checkpoints/tokens-N beside its config.yaml",
            json_schema_extra=MAY_CHANGE,  # read at the start only
        )
        method: Method = Field("tile_center", description="where old weights lie: in the middle, or from the edge on")
        depth: Depth = Field("spread", description="new layer i is old round(i * old / new); stack: i modulo old")
        rescale: bool = Field(True, description="divide by the number of copies of an input (ModernBERT: no)")
        fresh: Annotated[Any, *INITS.slot()] = Field("full_megatron", description="init of what the source has not")

    grows: ClassVar[bool] = True

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        self.config = config
        self.fresh = INITS.build(config.fresh, num_hidden_layers=num_hidden_layers)

    def __call__(
        self, module: nn.Module, seed: int, prefix: str = "", source: FlexBertForMaskedLM | None = None
    ) -> None:
        """Fill `module`, a model with a `config`, in place from `source`, which stays as it is. Nothing happens to what
        lives on the meta device.

        Raises ConfigError, starting with `init.from`, without a source, or for one that does not grow into `module`.
        """
        if any(parameter.is_meta for parameter in module.parameters()):
            return
        if source is None:
            raise ConfigError(
                f"init.from: {self.config.source}: the model there was not given: read it (from_hf, for an export) and "
                "pass it as build(config, grow_from=MODEL)"
            )
        self.fresh(module, seed, prefix)
        grown = grow(source, module, self.config, prefix)
        with torch.no_grad():
            for name, parameter in module.named_parameters(prefix=prefix):
                if name in grown:
                    parameter.copy_(grown[name])


def grow(source: FlexBertForMaskedLM, model: nn.Module, config: Grow.Config, prefix: str = "") -> dict[str, Tensor]:
    """Float32 weights for `model` under its own names, prefixed, from those of `source`, in host memory.

    Without those of a head of another kind. What else of the source is left out, or acts otherwise here, is logged.
    Raises ConfigError for a weight that the source lacks or has larger.
    """
    where = f"init.from: {config.source}"
    ours: FlexBertConfig = model.config  # pyright: ignore[reportAssignmentType]
    weights = source.state_dict()
    old_axes, new_axes, tied_norm = _axes(source, ""), _axes(model, prefix), _tied_norm(source)
    depth = 1 + max(int(name.split(".")[2]) for name in new_axes if name.startswith("encoder.layers."))
    layers = [layer_of(index, source.config.num_hidden_layers, depth, config.depth) for index in range(depth)]
    keeps_head = ours.head.name == source.config.head.name and any(name.startswith("head.") for name in new_axes)
    _check(source.config, ours, layers, keeps_head, where)
    grown, taken = {}, set()
    for name, new in new_axes.items():
        if name.startswith("head.") and not keeps_head:
            continue
        old_name = _old_name(name, layers, old_axes)
        if old_name is None:
            raise ConfigError(f"{where}: has no {name}: growing keeps the architecture, only sizes change")
        taken.add(old_name)
        old, tensor = old_axes[old_name], weights[old_name].float().cpu()
        for axis, (old_parts, new_parts) in enumerate(zip(old.parts, new.parts, strict=True)):
            index = tiled_axis(old_parts, new_parts, config.method)
            if index is None or (new.is_table and axis == 0 and old_parts != new_parts):
                raise ConfigError(
                    f"{where}: {old_name} is {_size(old)} there, {_size(new)} here: widths only grow, tables keep "
                    "their length"
                )
            tensor = tensor.index_select(axis, index)
            # Inputs of linear maps; and the norm whose output meets the token table, which is tiled without division.
            if config.rescale and ((new.is_linear and axis == 1) or name.startswith(tied_norm)):
                tensor = tensor / index.bincount()[index]
        grown[name] = tensor
    able = {name for name in old_axes if keeps_head or not name.startswith("head.")}
    _say_left_out(able - taken, layers, source.config.num_hidden_layers, where)
    return grown


def layer_of(index: int, old: int, new: int, depth: Depth) -> int:
    """The old layer that new layer `index` copies."""
    return index % old if depth == "stack" else min(round(index * old / new), old - 1)


def tiled_axis(old: Parts, new: Parts, method: Method) -> Tensor | None:
    """(new length,) int64: the old place that each new one copies; None when the axis cannot grow so.

    Parts tile apart, and so does each of their axes: heads are copied whole.
    """
    if len(old) != len(new):
        return None
    pieces, start = [], 0
    for old_shape, new_shape in zip(old, new, strict=True):
        index = torch.zeros((), dtype=torch.int64)
        for small, large in zip(old_shape, new_shape, strict=True):
            if large < small:
                return None
            first = (large - small) // 2 if method == "tile_center" else 0
            index = index[..., None] * small + (torch.arange(large) - first) % small
        pieces.append(start + index.flatten())
        start += math.prod(old_shape)
    return torch.cat(pieces)


class _Axes(NamedTuple):
    """How a parameter's axes divide, and whose it is."""

    parts: tuple[Parts, ...]
    is_linear: bool
    is_table: bool


def _size(axes: _Axes) -> str:
    return " x ".join(str(sum(math.prod(part) for part in parts)) for parts in axes.parts)


def _axes(model: nn.Module, prefix: str) -> dict[str, _Axes]:
    """By name of the parameter."""
    found = {}
    for path, module in model.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            parts: tuple[Parts, ...] = tuple(((size,),) for size in parameter.shape)
            if hasattr(module, "output_parts"):
                parts = (module.output_parts, getattr(module, "input_parts", None))[: parameter.ndim]  # pyright: ignore
            kinds = (isinstance(module, nn.Linear), isinstance(module, nn.Embedding))
            found[f"{path}.{name}" if path else name] = _Axes(parts, *kinds)
    return found


def _old_name(name: str, layers: list[int], old_axes: dict[str, Any]) -> str | None:
    """The source's parameter for `name`: of the mapped layer, or of the next one that has it (ModernBERT's first layer
    has no attention norm)."""
    if not name.startswith("encoder.layers."):
        return name if name in old_axes else None
    _, _, index, rest = name.split(".", 3)
    candidates = (f"encoder.layers.{layer}.{rest}" for layer in range(layers[int(index)], 1 + max(layers)))
    return next((candidate for candidate in candidates if candidate in old_axes), None)


def _tied_norm(model: FlexBertForMaskedLM) -> str:
    """Path of the norm whose output the token table reads as decoder; a name of no weight when it does not.

    A head with a norm is taken to end with it.
    """
    table = model.encoder.token_table
    if model.head.decoder(table)[0] is not table:
        return "none"
    return "head.norm." if hasattr(model.head, "norm") else "encoder.final_norm."


def _check(source: FlexBertConfig, model: FlexBertConfig, layers: list[int], keeps_head: bool, where: str) -> None:
    """Raise ConfigError where the two are of different kinds; say what else differs besides sizes.

    layers: for each of the model's, the source's that it copies. keeps_head: whether the head grows too.
    """
    if source.vocab_size != model.vocab_size:
        raise ConfigError(f"{where}: vocab_size {source.vocab_size} there, {model.vocab_size} here: must be the same")
    slots = ("embedding", "position", "attention", "norm", "mlp", "block") + (("head",) if keeps_head else ())
    said: _Facts = set()
    for slot in slots:
        theirs, ours = getattr(source, slot), getattr(model, slot)
        if theirs.name != ours.name:
            raise ConfigError(f"{where}: {slot} {theirs.name!r} there, {ours.name!r} here: only sizes can change")
        said |= _say_differences(theirs, ours, f"{where}: {slot}", said)
    for slot in ("attention", "mlp", "block"):  # initial layers may have their own
        for index, old in enumerate(layers):
            theirs, ours = getattr(source.layer(old), slot), getattr(model.layer(index), slot)
            said |= _say_differences(theirs, ours, f"{where}: layer {index}, from layer {old}: {slot}", said)


def _say_differences(theirs: Component, ours: Component, where: str, said: _Facts) -> _Facts:
    """Log the fields that differ, less those said before; gives what is said now."""
    if theirs.name != ours.name:
        pairs = {"name": (theirs.name, ours.name)}
    else:
        fields = [field for field in type(ours).model_fields if not field.endswith("dropout")]
        pairs = {field: (getattr(theirs, field), getattr(ours, field)) for field in fields}
    slot = where.rpartition(" ")[2]
    found: _Facts = set()
    for field, (there, here) in pairs.items():
        fact = (slot, field, str(there), str(here))
        if there != here and fact not in said:
            found.add(fact)
            log.warning("%s.%s is %s there, %s here", where, field, there, here)
    return found


def _say_left_out(names: set[str], layers: list[int], depth: int, where: str) -> None:
    """Log the source's layers, of `depth`, and parameters that nothing is grown from."""
    if unused := sorted(set(range(depth)) - set(layers)):
        message = "%s: has %d layers, of which layers %s are left out here, where there are %d"
        log.warning(message, where, depth, ", ".join(map(str, unused)), len(layers))
    others = [name for name in sorted(names) if not name.startswith(tuple(f"encoder.layers.{n}." for n in unused))]
    for name in dict.fromkeys(re.sub(r"^(encoder\.layers)\.\d+\.", r"\1.*.", name) for name in others):
        log.warning("%s: %s is left out: this model has no such parameter", where, name)
