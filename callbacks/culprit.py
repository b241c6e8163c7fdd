"""Where a loss or gradient that is not finite comes from."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from composer.core import State, get_precision_context
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexbert.heads import Decoder
from ranks import of_all_ranks


def name_culprit(state: State, model: nn.Module, microbatches: Iterable[Any], generator_seed: int) -> str:
    """Run the step's forward and backward once more and say what is not finite first. A collective.

    model: as Composer has it, less DDP's wrapper. generator_seed: of the step on this rank. Leaves gradients behind.
    Modules are looked at in the order in which they finish; when all outputs are finite, the first parameter in the
    order of the backward pass (the last in the model's) names the place where the gradient breaks.
    """
    torch.manual_seed(generator_seed)
    found = _forward_and_backward(state, model, microbatches)
    for rank, text in enumerate(of_all_ranks(found)):
        if text is not None:
            return f"first bad module: {text} (rank {rank})"
    return "forward and backward were finite when they were run again"


def _forward_and_backward(state: State, model: nn.Module, microbatches: Iterable[Any]) -> str | None:
    bad: list[str] = []
    # A decoder is never called, and refuses hooks
    names = {module: name for name, module in model.named_modules() if name and not isinstance(module, Decoder)}

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if not bad and not all(_finite(tensor) for tensor in _tensors(output)):
            bad.append(f"{names[module]} ({type(module).__name__}), in the forward pass")

    handles = [module.register_forward_hook(look) for module in names]
    model.zero_grad(set_to_none=True)
    try:
        for microbatch in microbatches:
            batch = state.device.batch_to_device(microbatch)
            with get_precision_context(state.precision, state.precision_config):
                loss = model.loss(model(batch), batch)  # pyright: ignore[reportCallIssue]
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in reversed(list(model.named_parameters())):
        if not bad and parameter.grad is not None and not _finite(parameter.grad):
            module = model.get_submodule(name.rpartition(".")[0])
            bad.append(f"{name} ({type(module).__name__}), in the backward pass")
    return bad[0] if bad else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those in a module's output: a tensor, a sequence, a mapping or a plain object of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict) or hasattr(output, "__dict__"):
        yield from _tensors(list(output.values() if isinstance(output, dict) else vars(output).values()))


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())
