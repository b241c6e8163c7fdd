"""What is never made whole, and what is made once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexbert import build, losses, rotary
from flexbert.kernels import AttentionPlan, attend
from flexbert.losses import masked_cross_entropy, masked_evaluation
from flexbert.registry import NORMS
from tests.helpers.models import batch_of, tiny

CHUNK = 2**13
MASKED, VOCAB, WIDTH = 600, 500, 8


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=["plain", "both"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_never_exist_whole(options: dict[str, Any], tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", {"cpu": CHUNK})
    hidden_states = torch.randn(MASKED, WIDTH, requires_grad=True)
    weight, bias = torch.randn(VOCAB, WIDTH, requires_grad=True), torch.zeros(VOCAB, requires_grad=True)
    targets = torch.randint(0, VOCAB, (MASKED,))
    with _Largest() as loss:
        masked_cross_entropy(hidden_states, weight, bias, targets, **options).backward()
    with _Largest() as evaluation:
        masked_evaluation(hidden_states, weight, bias, targets)
    config = tiny(vocab_size=VOCAB, num_hidden_layers=1, head={"name": "mlm", "tied": tied})
    model, batch = build(config), batch_of((50, 70), vocab_size=VOCAB, masked=1.0)
    with _Largest() as step:
        model(*batch).loss.backward()
    # A chunk may round up to one more row; tables and gradients of weights are smaller than the logits too
    largest = max(CHUNK + VOCAB, VOCAB * WIDTH)
    assert 0.5 * CHUNK < loss.elements <= largest < MASKED * VOCAB / 30
    assert 0.5 * CHUNK < evaluation.elements <= largest
    assert step.elements <= max(CHUNK + VOCAB, VOCAB * 48) < 120 * VOCAB
    with _Largest() as whole:
        model(*batch[:3])
    assert whole.elements >= 120 * VOCAB, "without labels the logits are the result: the measure works"


def test_tables_of_angles_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[float, int]] = []
    real = rotary.angle_table

    def counted(config: Any, theta: float, head_dim: int, positions: int, device: torch.device) -> Tensor:
        made.append((theta, positions))
        return real(config, theta, head_dim, positions, device)

    monkeypatch.setattr(rotary, "angle_table", counted)
    model = build(tiny(num_hidden_layers=4, max_position_embeddings=1024))
    for lengths in ((5, 100), (512,), (3, 3)):
        model(*batch_of(lengths)).loss.backward()
    assert made == [(5000.0, 512), (100.0, 512)], "one table for all global layers, one for all local ones"
    for lengths in ((600,), (5, 512)):
        model(*batch_of(lengths))
    assert made[2:] == [(5000.0, 600), (100.0, 600)], "a longer one when a longer sequence comes"
    model.set_rope_theta(global_theta=100.0)
    for lengths in ((600,), (5,)):
        model(*batch_of(lengths))
    assert made[4:] == [(100.0, 600)], "one theta, one table"


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_a_gate_is_its_formula_and_keeps_what_it_was_given(
    tokens: int, dtype: torch.dtype, activation: str, half: str
) -> None:
    """Against torch's functions and autograd, to rounding; gelu and silu without keeping the activated half."""
    module: Any = (
        build(tiny(mlp={"name": "glu", "activation": activation, "activated_half": half})).encoder.layers[1].mlp
    )
    module.Wo = nn.Identity()  # what the gate gives, with no norm and no dropout behind it
    module.to(dtype)
    states = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated = module(states)
    weights = torch.randn(gated.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [states, module.Wi.weight]
    found = [gated, *torch.autograd.grad((gated * weights).sum(), inputs)]
    exact = torch.float64 if dtype == torch.float32 else dtype
    states, weight = (tensor.detach().to(exact).requires_grad_() for tensor in inputs)
    first, second = F.linear(states, weight).chunk(2, -1)
    acted, factor = (first, second) if half == "first" else (second, first)
    expected = getattr(F, activation)(acted) * factor
    reference = [expected, *torch.autograd.grad((expected * weights.to(exact)).sum(), (states, weight))]
    for ours, theirs in zip(found, reference, strict=True):
        if dtype == torch.float32:  # worst measured: 5.1e-7 of the largest value, where torch errs to the same bits
            bound = 1e-6 * float(theirs.detach().abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours.to(exact), theirs, atol=bound, rtol=0)
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    wide = [x for x in kept if x.shape == (tokens, 2 * gated.shape[1])]
    if activation != "relu" and tokens:
        assert len(wide) == 1
        assert not [x for x in kept if x.shape == gated.shape], "the activated half is made again"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (77, 24), (24,), (13, 3, 8)], ids=str)
def test_rmsnorm_is_its_formula_and_keeps_what_it_was_given(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Under autocast too, as its backward may run there: inside it never rounds to bfloat16."""
    torch.manual_seed(0)
    norm = NORMS.build(NORMS.parse("rmsnorm"), hidden_size=shape[-1]).to(dtype)
    torch.nn.init.normal_(norm.weight)
    states = (torch.randn(shape) * torch.rand(shape[0], *(1,) * (len(shape) - 1))).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        found = norm(states)
    assert sum(tensor.numel() for tensor in kept) == states.numel() + norm.weight.numel() + states[..., 0].numel()
    weights = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found.backward(weights)
    assert found.dtype == dtype
    exact, scale = states.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + norm.eps) * scale
    expected.backward(weights.double())
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in ((found, expected), (states.grad, exact.grad), (norm.weight.grad, scale.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=bound, atol=bound)


@pytest.mark.parametrize("lengths", [(300,), (40, 170, 90)], ids=["one", "several"])
def test_attention_in_bfloat16_keeps_nothing_wider(lengths: tuple[int, ...]) -> None:
    """For the gradients: queries, keys, values, the result, and the norm of each row of scores; in float32, where the
    CPU computes it so, they would be twice as large."""
    total, heads, dim = sum(lengths), 2, 32
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), total)
    qkv = torch.randn(total, 3 * heads, dim, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        queries, keys, values = qkv.split(heads, dim=1)
        attend(queries.clone(), keys.clone(), values.clone(), plan, window_size=(-1, -1), backend="sdpa")
    slots = sum(bucket.batch * bucket.length for bucket in plan.buckets)
    tables = [tensor for tensor in kept.values() if tensor.is_floating_point()]
    assert sum(tensor.nbytes for tensor in tables) <= slots * heads * (4 * dim * 2 + 2 * 4)
    assert len(tables) >= 4
