"""Weights under Hugging Face's names and under ours."""

import logging
import re
from collections.abc import Mapping as Named

import torch
from torch import Tensor

from flexbert.hf.mappings import Mapping
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)

# What can be widened to float32 as it is; integers and float8 are codes that need their scales.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def hf_names(mapping: Mapping, name: str) -> list[str]:
    """The Hugging Face names of one of our weights; several when ours is theirs joined along the first axis."""
    for ours, theirs in mapping.names:
        if match := re.match(ours, name):
            return [match.expand(part) + name[match.end() :] for part in theirs]
    raise AssertionError(f"no Hugging Face name for {name}")


def to_hf_state(mapping: Mapping, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names."""
    renamed = {}
    for name, tensor in state.items():
        names = hf_names(mapping, name)
        renamed |= {theirs: part.contiguous() for theirs, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return renamed


def float_state(given: Named[str, Tensor]) -> dict[str, Tensor]:
    """The weights, without the prefixes that compiled modules and DataParallel put before names.

    Raises ConfigError for one that is not plain numbers: adapters, quantized or absent ones.
    """
    state = {}
    for name, tensor in given.items():
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        if re.search(r"\.lora_|\.base_layer\.|\.parametrizations\.", f".{plain}"):
            raise ConfigError(f"{name}: is part of an adapter or a parametrization: merge it into the weights and save")
        if tensor.is_meta:
            raise ConfigError(f"{name}: is not in memory (device meta): load the model whole, without offloading")
        state[plain] = tensor
    return state


def from_hf_state(
    mapping: Mapping, given: dict[str, Tensor], wanted: Named[str, torch.Size], task: str = "mlm"
) -> dict[str, Tensor]:
    """Copies, float32 on the CPU, of the weights that we name `wanted`, of these shapes.

    given: under the names of an architecture's model for any task, or of its encoder alone. What repeats another weight
    or serves another task is left out, and said. Raises ConfigError for a weight that is missing, of another shape or
    dtype, and for one left over.
    """
    given = _full_names(mapping, given)
    state, used = {}, set()
    for name, shape in wanted.items():
        names = hf_names(mapping, name)
        parts = [_plain(theirs, _get(mapping, given, theirs, task)) for theirs in names]
        expected = (shape[0] // len(names), *shape[1:])
        for theirs, part in zip(names, parts, strict=True):
            if part.shape != expected:
                shapes = f"{tuple(part.shape)} in the weights, {expected} by the config"
                raise ConfigError(f"{theirs}: {shapes}: they are of different models")
        used |= set(names)
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    left_out = []
    for theirs in sorted(given.keys() - used):
        if first := mapping.repeats.get(theirs):
            if first in given and not torch.equal(_plain(theirs, given[theirs]), _plain(first, given[first])):
                log.warning("%s: is not %s, which takes its place since the two are tied: left out", theirs, first)
        elif re.match(mapping.other, theirs) or (task == "encoder" and not theirs.startswith(mapping.prefix)):
            left_out.append(theirs)
        else:
            raise ConfigError(f"{theirs}: has no place in the model that the config describes: use the weights' own")
    if left_out:
        log.info("left out, not part of a model for task %s: %s", task, ", ".join(left_out))
    return state


def _full_names(mapping: Mapping, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As of a model with a head and of today: encoders alone lack a prefix, old norms have gamma and beta."""
    prefix = "" if any(name.startswith(mapping.prefix) for name in given) else mapping.prefix
    names = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", f"{prefix}{name}")): name for name in given}
    if len(names) < len(given):
        twice = sorted(given.keys() - set(names.values()))[0]
        raise ConfigError(f"{twice}: is there under its older and its newer name: keep one")
    return {name: given[before] for name, before in names.items()}


def _get(mapping: Mapping, given: dict[str, Tensor], name: str, task: str) -> Tensor:
    """The weight, or what repeats it."""
    stand_ins = [other for other, first in mapping.repeats.items() if first == name]
    for candidate in (name, *stand_ins):
        if candidate in given:
            return given[candidate]
    of_encoder = name.startswith(mapping.prefix)
    head = "a masked-token head" if task == "mlm" else f"a head for {task}"
    hint = "" if of_encoder else f": an encoder without {head} loads with task='encoder'"
    raise ConfigError(f"{name}: missing in the weights{hint}")


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A copy, float32 on the CPU."""
    require_numbers(name, tensor)
    return tensor.detach().to("cpu", torch.float32, copy=True)


def require_numbers(name: str, tensor: Tensor) -> None:
    """Raise ConfigError for a weight of a dtype that cannot be widened to float32 as it is."""
    if tensor.dtype not in _DTYPES:
        raise ConfigError(
            f"{name}: {tensor.dtype} cannot be read as plain numbers: save the model in float32 or bfloat16"
        )


def moved_table(table: Tensor, before: int, after: int) -> Tensor:
    """A position table whose position 0 is at row `after`, from one with it at row `before`.

    The rows in front are read by no position: as many as fit stay, further ones are 0.
    """
    front = table.new_zeros((after, table.shape[1]))
    kept = min(before, after)
    front[:kept] = table[:kept]
    return torch.cat((front, table[before:]))
