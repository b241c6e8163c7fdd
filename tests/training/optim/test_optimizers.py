"""Optimizers against their published formulas, Composer's and torch's; which parameters decay; the true global norm."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import ranks
from flexbert import FlexBertForMaskedLM, build
from flexbert.layers import block_matrices
from recipe.config import load_run_config
from recipe.schedules import set_learning_rate
from recipe.slots import OPTIMIZERS
from tests.helpers.optimizers import closure_of, gradient_of, loss_of, make, tiny, worst
from tests.helpers.tiny import write_config
from training.checkpoints.files import load_checkpoint, restore, take_snapshot, write_checkpoint
from training.optim.muon import orthogonalise
from training.optim.stable_adamw import ShardedStableAdamW
from training.states import state_bytes


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
def test_every_optimizer_learns_by_closure(name: str) -> None:
    model = tiny()
    optimizer = make(name, model)
    before = float(loss_of(model, 0))
    for _ in range(20):
        returned = optimizer.step(closure_of(model, optimizer, 0))
    assert float(returned) < 0.5 * before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_decoupled_adamw_is_composers() -> None:
    """Ten steps with a learning rate that rises and falls. Measured: 1.2e-7 apart."""
    from composer.optim import DecoupledAdamW

    ours, theirs = tiny(), tiny()
    optimizer = make("decoupled_adamw", ours, lr=0.02, weight_decay=0.1, decayed="all")
    reference = DecoupledAdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    start = [parameter.clone() for parameter in ours.parameters()]
    for step, lr in enumerate([0.005, 0.01, 0.015, 0.02, 0.02, 0.02, 0.015, 0.01, 0.005, 0.001]):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            set_learning_rate(stepper, lr, 0.02)
            stepper.step(closure_of(model, stepper, step))
        assert worst(ours, theirs) < 1e-6, step
    assert min(float((old - new).abs().max()) for old, new in zip(start, ours.parameters(), strict=True)) > 0.01
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]  # as configured, also after a step


def test_decoupled_decay_is_relative_to_the_phases_peak() -> None:
    """Without gradients only the decay moves weights: by lr / peak * weight_decay, whatever the peak."""
    for peak in (0.02, 0.0004):
        model = tiny()
        optimizer = make("decoupled_adamw", model, lr=0.02, weight_decay=0.1)
        weight = model.encoder.token_table
        before = weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_learning_rate(optimizer, peak / 4, peak)
        optimizer.step()
        torch.testing.assert_close(weight, before * (1 - 0.1 / 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("decouple_lr", [True, False])
def test_stableadamw_of_cuda_and_shards_is_optimis(decouple_lr: bool) -> None:
    """All tensors at once against one by one, ten steps; gradients that grow clip some updates. Measured: 1.2e-7 apart."""
    ours, theirs = tiny(), tiny()
    options = {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": decouple_lr}
    together, one_by_one = (make("stableadamw", model, **options) for model in (ours, theirs))
    assert isinstance(together, ShardedStableAdamW)
    for step in range(10):
        for name, parameter in ours.named_parameters():
            parameter.grad = gradient_of(name, parameter.shape, step) * 2.0**step
            theirs.get_parameter(name).grad = parameter.grad.clone()
        set_learning_rate(together, 0.02 - 0.001 * step, 0.02)
        set_learning_rate(one_by_one, 0.02 - 0.001 * step, 0.02)
        with torch.no_grad():
            together.step_together(None)
        one_by_one.step()
        assert worst(ours, theirs) < 1e-6, step
    weights = [group["params"][0] for group in together.param_groups]
    for weight, other in zip(weights, (group["params"][0] for group in one_by_one.param_groups), strict=True):
        for key, value in one_by_one.state[other].items():
            torch.testing.assert_close(together.state[weight][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (5, 1), (64, 512)])
def test_newton_schulz_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """NS(U S V^T) = U p(S) V^T, p the five-fold polynomial: UV^T but for singular values in [0.68, 1.21] of all that
    are over 1/400 of the Frobenius norm: what that polynomial makes of [1/400, 1] (the blog's: 0.7 to 1.2)."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    values = (s / s.norm()).numpy()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(found, u @ torch.diag(torch.from_numpy(values)) @ vh, atol=1e-6, rtol=0)
    singular = torch.linalg.svdvals(found)[s / s.norm() > 1 / 400]
    assert len(singular) >= len(s) - 1
    assert float(singular.min()) > 0.68
    assert float(singular.max()) < 1.21
    deviation = torch.linalg.norm(found - u @ vh) / math.sqrt(len(s))
    assert float(deviation) < 0.32
    assert not orthogonalise(torch.zeros(shape)).any()
    assert orthogonalise(matrix.float()).dtype == torch.float32
    torch.testing.assert_close(orthogonalise(matrix.float()).double(), found, atol=1e-4, rtol=0)


def reference_muon(
    weight: np.ndarray, gradients: list[np.ndarray], parts: list[int], lr: float, decay: float, adjust_lr: str
) -> np.ndarray:
    """Muon in float64, written down from the blog and Moonlight's eq. 3 and 4, by singular values."""
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        nesterov = gradient + 0.95 * momentum
        updates = []
        for part in np.split(nesterov, np.cumsum(parts)[:-1]):
            u, s, vh = np.linalg.svd(part, full_matrices=False)
            s = s / (np.linalg.norm(s) + 1e-7)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            rows, columns = part.shape
            scale = 0.2 * max(rows, columns) ** 0.5 if adjust_lr == "match_rms_adamw" else max(1, rows / columns) ** 0.5
            updates.append(scale * (u * s) @ vh)
        weight = weight - lr * (decay * weight + np.concatenate(updates))
    return weight


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_muon_is_the_published_one_for_blocks_and_adamw_for_the_rest(adjust_lr: str) -> None:
    """Six steps on gradients from a file of our own making (each parameter's are random). Measured: 2e-7 apart."""
    model = tiny()
    optimizer = make("muon", model, adjust_lr=adjust_lr, adamw_lr_factor=0.5)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = {
        **{f"encoder.layers.{layer}.attn.Wqkv.weight": [16, 8, 8] for layer in (0, 1)},  # 4, 2 and 2 heads of 4
        **{f"encoder.layers.{layer}.attn.Wo.weight": [16] for layer in (0, 1)},
        **{f"encoder.layers.{layer}.mlp.Wi.weight": [24, 24] for layer in (0, 1)},
        **{f"encoder.layers.{layer}.mlp.Wo.weight": [16] for layer in (0, 1)},
    }
    others = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items() if name not in parts}
    groups = [
        {"params": [tensor for tensor in others.values() if (tensor.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=0.5 * 0.01, betas=(0.9, 0.98), eps=1e-6)
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in start}
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients[name].append(parameter.grad.double().numpy())
            if name in others:
                others[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        if name in parts:
            history = gradients[name]
            expected = reference_muon(start[name].double().numpy(), history, parts[name], 0.01, 0.1, adjust_lr)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=2e-6)
        else:
            torch.testing.assert_close(parameter, others[name], atol=1e-7, rtol=1e-6)


def test_muon_moves_matrices_as_much_as_adamw() -> None:
    """Moonlight's reason for 0.2 sqrt(max(rows, columns)): a root mean square of 0.2 lr an entry, for matrices of full
    rank, whatever the shape."""
    for shape in ((64, 64), (256, 64), (64, 256)):
        layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))])})
        (weight,) = layers.parameters()
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        make("muon", layers, weight_decay=0.0).step()
        rms = float((weight - before).square().mean().sqrt()) / 0.01
        assert rms == pytest.approx(0.2, rel=0.2), shape


def test_fusing_projections_changes_nothing_for_muon() -> None:
    """One matrix Wqkv trains as Wq, Wk and Wv do."""
    fused, apart = tiny(), tiny(fused=False)
    names = {name: tensor for name, tensor in fused.state_dict().items() if "Wqkv" not in name}
    for layer in (0, 1):
        path = f"encoder.layers.{layer}.attn."
        queries, keys, values = fused.get_parameter(path + "Wqkv.weight").split([16, 8, 8])
        names |= {path + "Wq.weight": queries, path + "Wk.weight": keys, path + "Wv.weight": values}
    apart.load_state_dict(names)
    for model in (fused, apart):
        optimizer = make("muon", model)
        for number in range(5):
            optimizer.step(closure_of(model, optimizer, number))
    for layer in (0, 1):
        path = f"encoder.layers.{layer}.attn."
        parts = torch.cat([apart.get_parameter(f"{path}W{letter}.weight") for letter in "qkv"])
        torch.testing.assert_close(fused.get_parameter(path + "Wqkv.weight"), parts, atol=1e-5, rtol=0)
    assert float(loss_of(fused, 9)) == pytest.approx(float(loss_of(apart, 9)), abs=1e-4)


def test_block_matrices_are_those_of_attention_and_mlp() -> None:
    model = tiny()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[matrix].split(".", 3)[3] for matrix in block_matrices(model)] == [
        "attn.Wqkv.weight",
        "attn.Wo.weight",
        "mlp.Wi.weight",
        "mlp.Wo.weight",
    ] * 2
    assert list(block_matrices(model).values()) == [[16, 8, 8], [16], [24, 24], [16]] * 2


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
def test_continuing_equals_not_stopping(tmp_path: Path, name: str) -> None:
    """With a real model's groups, over a change of the learning rate and its peak, to the last bit."""

    def steps(model: FlexBertForMaskedLM, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            peak = 0.02 if number < 4 else 0.01
            set_learning_rate(optimizer, peak * (1 - number / 10), peak)
            optimizer.step(closure_of(model, optimizer, number))

    straight, first, second = tiny(), tiny(), tiny(seed=4)
    steps(straight, make(name, straight), range(8))
    optimizer = make(name, first)
    steps(first, optimizer, range(5))
    write_checkpoint(tmp_path / "tokens-5", take_snapshot(first, optimizer), {})
    optimizer = make(name, second)
    restore(load_checkpoint(tmp_path / "tokens-5"), second, optimizer)
    steps(second, optimizer, range(5, 8))
    assert worst(second, straight) == 0.0


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize("decayed", ["matrices", "no_embeddings", "all"])
def test_what_decays(name: str, decayed: str) -> None:
    """Told by what moves without gradients, in two steps: SOAP's first moves nothing. The tied decoder is the token
    table; its bias and the norms are vectors."""
    model = tiny()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            before[key] = parameter.fill_(1.0).clone()
            parameter.grad = torch.zeros_like(parameter)
    optimizer = make(name, model, weight_decay=1e-3, decayed=decayed)
    optimizer.step()
    optimizer.step()
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    matrices = {key for key, parameter in before.items() if parameter.ndim > 1}
    expected = {
        "matrices": matrices,
        "no_embeddings": matrices - {"encoder.embedding.tokens.weight"},
        "all": set(before),
    }[decayed]
    assert moved == expected
    assert "encoder.embedding.tokens.weight" in matrices


ON_SHARDS = ("muon", "stableadamw")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
def test_states_take_the_bytes_that_are_said(tiny_data: Path, tmp_path: Path, name: str) -> None:
    """Of which `auto` leaves room, and doctor asks for room on the disk: no optimizer takes more, and most as much."""
    config = load_run_config(write_config(tmp_path, tiny_data, 1, optimizer=name))
    averaged = load_run_config(write_config(tmp_path, tiny_data, 1, optimizer=name, ema={"decay": 0.9}))
    model = build(config.model, seed=3)
    optimizer = OPTIMIZERS.build(config.optimizer, model=model, lr=0.01)
    for number in range(2):
        optimizer.step(closure_of(model, optimizer, number))
    tensors = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    found, told = sum(tensor.nbytes for tensor in tensors if tensor.ndim), state_bytes(config, model)
    assert 0 < found <= told
    assert found == told or name in ("lion", "muon", "normuon")
    assert state_bytes(averaged, model) - told == sum(parameter.nbytes for parameter in model.parameters())


def step_sharded(rank: int, folder: str) -> None:
    """One of four processes: three steps of optimizers on models of which two copies are each in two parts, as
    FSDP2's `replicate: 2` leaves them. Rank 0 saves the weights."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    mesh = ranks.mesh(2, "cpu")
    for name in ON_SHARDS:
        model = tiny()
        for layer in model.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = make(name, model)
        for number in range(3):
            for key, parameter in sorted(model.named_parameters()):
                assert isinstance(parameter, DTensor)
                whole = gradient_of(key, parameter.shape, number)
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            optimizer.step()
        gathered = {key: parameter.full_tensor() for key, parameter in model.named_parameters()}  # pyright: ignore
        if rank == 0:
            torch.save(gathered, f"{folder}/{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_an_optimizer_on_shards_is_that_of_the_whole(tmp_path: Path) -> None:
    """Four gloo processes. A rank has 16 of the 32 rows of queries, keys and values, and so has one other."""
    torch.multiprocessing.spawn(step_sharded, (str(tmp_path),), nprocs=4)  # pyright: ignore[reportPrivateImportUsage]
    for name in ON_SHARDS:
        model = tiny()
        optimizer = make(name, model)
        for number in range(3):
            for key, parameter in model.named_parameters():
                parameter.grad = gradient_of(key, parameter.shape, number)
            optimizer.step()
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key], parameter.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_matrices_together_are_orthogonalised_as_each_alone(shape: tuple[int, int]) -> None:
    """As on CUDA, where matrices of one shape are one chain of products."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(matrices)
    for each, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalise(each), atol=1e-5, rtol=0)
