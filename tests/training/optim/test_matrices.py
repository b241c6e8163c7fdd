"""NorMuon and SOAP against their published formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flexbert_core.schema import RunError
from tests.helpers.optimizers import gradient_of, make, tiny

# Rows of the parts: 4, 2 and 2 heads of 4; halves of a gated mlp.
PARTS = {"attn.Wqkv": [16, 8, 8], "attn.Wo": [16], "mlp.Wi": [24, 24], "mlp.Wo": [16]}
MATRICES = {f"encoder.layers.{layer}.{name}.weight": rows for layer in (0, 1) for name, rows in PARTS.items()}


def reference_normuon(
    weight: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, size: str
) -> np.ndarray:
    """Of one part in float64, written down from the paper's algorithm 1 and its authors' code (Nesterov's momentum)."""
    rows, columns = weight.shape
    momentum, squares = np.zeros_like(weight), np.zeros((rows, 1))
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        u, s, vh = np.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        step = (u * s) @ vh
        squares = 0.9 * squares + 0.1 * (step**2).mean(axis=1, keepdims=True)
        even = step / np.sqrt(squares)
        if size == "match_rms_adamw":
            move = 0.2 * np.sqrt(rows * columns) / np.linalg.norm(even) * even
        else:
            move = max(1, rows / columns) ** 0.5 * np.linalg.norm(step) / np.linalg.norm(even) * even
        weight = weight - lr * (decay * weight + move)
    return weight


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_normuon_is_the_published_one(adjust_lr: str) -> None:
    """Six steps; every part of a fused matrix is a matrix of its own."""
    model = tiny()
    optimizer = make("normuon", model, adjust_lr=adjust_lr, row_beta=0.9)
    start = {name: model.get_parameter(name).detach().double().numpy().copy() for name in MATRICES}
    for number in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, parameter.shape, number)
        optimizer.step()
    for name, rows in MATRICES.items():
        gradients = [gradient_of(name, torch.Size(start[name].shape), number).double().numpy() for number in range(6)]
        first = 0
        for count in rows:
            part = slice(first, first + count)
            expected = reference_normuon(start[name][part], [each[part] for each in gradients], 0.01, 0.1, adjust_lr)
            found = model.get_parameter(name).detach().numpy()[part]
            np.testing.assert_allclose(found, expected, atol=5e-6)
            first += count


def test_normuon_moves_rows_alike() -> None:
    """What it is for: under Muon rows of a tall matrix move by different amounts."""
    spread = {}
    for name in ("muon", "normuon"):
        layer = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(8, 64, bias=False))])})
        (weight,) = layer.parameters()
        before = weight.detach().clone()
        weight.grad = gradient_of("rows", weight.shape, 0) * torch.linspace(0.1, 10, 64)[:, None]
        make(name, layer, weight_decay=0.0).step()
        sizes = (weight.detach() - before).norm(dim=1)
        spread[name] = float(sizes.max() / sizes.min())
    assert spread["muon"] > 3
    assert spread["normuon"] == pytest.approx(1, rel=1e-3)


class _One(nn.Module):
    """One matrix of a block."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
        self.layers = nn.ModuleList([nn.Sequential(linear)])
        with torch.no_grad():
            linear.weight.copy_(weight)
        self.weight = linear.weight


def test_soap_is_adam_in_the_basis_of_the_gradients() -> None:
    """Gradients U D V^T with fixed U and V: the weights' part in that basis moves as torch's AdamW moves D. The first
    gradient only sets the basis. Columns are in the order of their size, which changes on the way."""
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0],
        torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0],
    )
    start = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    model = _One(u @ start @ v.T)
    options = {"weight_decay": 0.1, "frequency": 2, "soap_beta1": 0.9, "soap_beta2": 0.8, "eps": 1e-12}
    optimizer = make("soap", model, lr=0.01, **options)
    turned = nn.Parameter(start.clone())
    adam = torch.optim.AdamW([turned], lr=0.01, betas=(0.9, 0.8), eps=1e-12, weight_decay=0.1)
    for number in range(9):
        sizes = torch.arange(1.0, 7.0, dtype=torch.float64).roll(number // 3) * (-1) ** number
        model.weight.grad = u @ torch.diag(sizes) @ v.T
        optimizer.step()
        if number:
            turned.grad = torch.diag(sizes)
            adam.step()
    found = u.T @ model.weight.detach() @ v
    torch.testing.assert_close(found.diagonal(), turned.detach().diagonal(), atol=1e-9, rtol=0)


def reference_soap(
    weight: torch.Tensor, gradients: list[torch.Tensor], q_l: torch.Tensor, q_r: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Of one part, in the words of algorithm 3: preconditioners, bases, rotated moments. q_l, q_r: the first bases,
    which are not unique where a gradient has less than full rank."""
    beta1, beta2, lr = options["soap_beta1"], options["soap_beta2"], options["lr"]
    sides = [(1 - beta2) * gradients[0] @ gradients[0].T, (1 - beta2) * gradients[0].T @ gradients[0]]
    for side, basis in zip(sides, (q_l, q_r), strict=True):
        values = basis.T @ side @ basis
        torch.testing.assert_close(values, torch.diag(torch.linalg.eigvalsh(side).flip(0)), atol=1e-12, rtol=0)
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=side.dtype), atol=1e-12, rtol=0)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(gradients[1:], 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (q_l.T @ g @ q_r) ** 2
        n = (q_l.T @ m @ q_r / (1 - beta1**t)) / (torch.sqrt(v / (1 - beta2**t)) + options["eps"])
        weight = weight - lr * options["weight_decay"] * weight - lr * q_l @ n @ q_r.T
        sides = [beta2 * sides[0] + (1 - beta2) * g @ g.T, beta2 * sides[1] + (1 - beta2) * g.T @ g]
        if t % options["frequency"] == 0:
            orders = [
                torch.stack([column @ side @ column for column in q.T]).sort(descending=True).indices
                for q, side in ((q_l, sides[0]), (q_r, sides[1]))
            ]
            q_l = torch.linalg.qr(sides[0] @ q_l[:, orders[0]]).Q
            q_r = torch.linalg.qr(sides[1] @ q_r[:, orders[1]]).Q
            v = v[orders[0]][:, orders[1]]
    return weight


def test_soap_is_the_published_one_for_blocks_and_adamw_for_the_rest() -> None:
    """In float64, twelve steps with a turn of the bases at each third; gradients of less than full rank (one token)
    among them: what is in the null space must stay finite."""
    model = tiny().double()
    options = {"lr": 0.01, "weight_decay": 0.1, "soap_beta1": 0.9, "soap_beta2": 0.8, "eps": 1e-8, "frequency": 3}
    optimizer = make("soap", model, **options)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    others = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items() if name not in MATRICES}
    groups = [
        {"params": [tensor for tensor in others.values() if (tensor.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    first_states: dict[str, dict[str, torch.Tensor]] = {}

    def gradient(name: str, number: int) -> torch.Tensor:
        shape = start[name].shape
        full = gradient_of(name, shape, number).double()
        return full[:, :1] @ full[:1] if len(shape) == 2 and number == 5 else full

    for number in range(12):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, number)
            if name in others:
                others[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        if number == 0:
            first_states = {name: dict(optimizer.state[model.get_parameter(name)]) for name in MATRICES}
    for name, parameter in model.named_parameters():
        if name not in MATRICES:
            torch.testing.assert_close(parameter, others[name], atol=1e-12, rtol=1e-9)
            continue
        first = 0
        for number, count in enumerate(MATRICES[name]):
            part = slice(first, first + count)
            left, right = (first_states[name][f"{side}_basis_{number}"] for side in ("left", "right"))
            gradients = [gradient(name, step)[part] for step in range(12)]
            expected = reference_soap(start[name][part], gradients, left, right, options)
            torch.testing.assert_close(parameter.detach()[part], expected, atol=1e-7, rtol=0)
            first += count


def test_soap_seeks_eigenvectors_in_float64_where_float32_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuSOLVER may fail to, of a first gradient of low rank."""
    real, asked = torch.linalg.eigh, list[torch.dtype]()

    def eigh(matrix: torch.Tensor) -> Any:
        asked.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")  # pyright: ignore[reportPrivateImportUsage]
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    model = _One(torch.zeros(6, 4))
    optimizer = make("soap", model)
    for number in range(2):
        model.weight.grad = gradient_of("low", torch.Size([6, 1]), number) @ torch.ones(1, 4)
        optimizer.step()
    assert asked == [torch.float32, torch.float64] * 2
    assert bool(torch.isfinite(model.weight).all())
    assert bool((model.weight != 0).any())


def test_soap_says_which_gradient_has_no_eigenvectors() -> None:
    model = _One(torch.zeros(6, 4))
    model.weight.grad = torch.full((6, 4), 1e25)  # whose squares float32 does not hold
    with pytest.raises(RunError, match=r"soap finds no eigenvectors of the first gradient of weight, nor in float64"):
        make("soap", model).step()


def step_on_ranks(rank: int, folder: str, name: str, sharded: bool) -> None:
    """One of two processes: three steps of a model that is whole on each, or sharded by FSDP2; rank 0 saves weights."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = tiny()
    if sharded:
        for layer in model.encoder.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = make(name, model)
    for number in range(3):
        for key, parameter in sorted(model.named_parameters()):
            whole = gradient_of(key, parameter.shape, number)
            parameter.grad = whole
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        optimizer.step()
    gathered: dict[str, Any] = {
        key: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for key, parameter in model.named_parameters()
    }
    torch.save(gathered, f"{folder}/weights-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_ranks_that_share_the_work_move_as_one(tmp_path: Path, name: str, sharded: bool) -> None:
    """Two gloo processes: each orthogonalises one of two matrices of a shape; both ranks end equal."""
    torch.multiprocessing.spawn(step_on_ranks, (str(tmp_path), name, sharded), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    model = tiny()
    optimizer = make(name, model)
    for number in range(3):
        for key, parameter in model.named_parameters():
            parameter.grad = gradient_of(key, parameter.shape, number)
        optimizer.step()
    found, other = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in range(2))
    for key, parameter in model.named_parameters():
        assert torch.equal(found[key], other[key]), key
        torch.testing.assert_close(found[key], parameter.detach(), atol=1e-6, rtol=0)
