"""`distill`: its loss and gradients are the formula's, with teachers of ours and of transformers; what is trained beside
the model goes on after a kill and is not exported."""

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import flexbert
import main
from data.feed.loader import build_loader
from flexbert import FlexBertConfig, build
from flexbert.accounting import batch_flops, count_parameters
from flexbert.distilling import Scored, divergence
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.cost import parameters_beside, phase_flops
from recipe.phases import PhasePlan
from tests.helpers.in_process import go
from tests.helpers.process import COUNTING
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, VOCABULARY, check_same, forget_after, write_config
from training.objectives.phases import Objectives, build_objectives, idle_parameters

STEPS = 6
TOKENS = 3 * ROWS * ROW
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
LAYERS = [{"student": 1, "teacher": 1}, {"student": 3, "teacher": 2}]
KEPT = ("model.safetensors", "optimizer.safetensors")


def save_bert(folder: Path, data: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {"intermediate_size": 32, "max_position_embeddings": 2 * ROW, "initializer_range": 0.5}
    BertForMaskedLM(BertConfig(**shape | changes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by transformers, wider than the model."""
    return save_bert(tmp_path_factory.mktemp("teacher") / "bert", tiny_data)


@pytest.fixture(scope="module")
def ours(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours, as wide as the model."""
    folder = tmp_path_factory.mktemp("teacher")
    file = write_config(folder, tiny_data, 1, model={"init": {"name": "full_megatron", "std": 0.3}})
    model = build(load_run_config(file).model, seed=8)
    flexbert.to_hf(model, tiny_data / "tokenizer", folder / "export")
    return folder / "export"


def write(folder: Path, data: Path, teacher: Path, *streams: str, **changes: Any) -> Path:
    objective = {"name": "distill", "teacher": str(teacher), "layers": LAYERS, **changes.pop("objective", {})}
    phases = [
        {"name": "masked", "tokens": TOKENS, **SHAPE, "masking": {"rate": 0.3}},
        {"name": "taught", "tokens": TOKENS, "objective": objective},
    ]
    return write_config(folder, data, STEPS, *(streams or ("full", "sparse")), **{"phases": phases, **changes})


def made(file: Path) -> tuple[Any, Any, Any, Any]:
    """Config, model with its parts, the objective of the last phase and a batch."""
    config = load_run_config(file)
    model = build(config.model, seed=1)
    plan = PhasePlan(config)
    return config, model, Objectives(config, plan, model).each[-1], next(iter(build_loader(plan.loader_config(config))))


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    wanted = (teacher / temperature).softmax(1)
    return temperature**2 * (wanted * (wanted.log() - (student / temperature).log_softmax(1))).sum()


def reference(config: Any, model: Any, teacher: Path, batch: Any) -> Tensor:
    """Document by document, by transformers' own model of the teacher, over all logits and hidden states."""
    theirs = AutoModelForMaskedLM.from_pretrained(teacher, trust_remote_code=False).eval()
    options, total = config.phases[-1].objective, torch.zeros(())
    kept: dict[int, Tensor] = {}
    for number, layer in enumerate(model.encoder.layers, 1):
        layer.register_forward_hook(lambda _, __, output, number=number: kept.update({number: output}))
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        ids, labels = batch["input_ids"][begin:end], batch["labels"][begin:end]
        logits = model(ids, torch.tensor([0, end - begin], dtype=torch.int32), end - begin).logits
        with torch.no_grad():
            told = theirs(input_ids=ids[None], output_hidden_states=True)
        masked = labels >= 0
        restored = F.cross_entropy(logits[masked], labels[masked], reduction="sum")
        differing = kl(logits[masked], told.logits[0][masked], options.temperature)
        total = total + (options.share * restored + (1 - options.share) * differing) / batch["masking_rate"]
        for number, pair in enumerate(options.layers):
            mine, wanted = kept[pair.student], told.hidden_states[pair.teacher][0]
            if mine.shape != wanted.shape:
                mine = mine @ model.parts["maps"][str(number)].weight.T
            total = total + options.hidden_weight * ((mine - wanted) ** 2).sum() / wanted.shape[1]
    return total


@pytest.mark.parametrize("streams", [("full", "sparse"), ("empty", "sparse")])
def test_loss_and_gradients_are_the_formula(
    tiny_data: Path, bert: Path, tmp_path: Path, streams: tuple[str, ...]
) -> None:
    """Of a teacher of another width; also of rows without any token to mask."""
    changes = {"share": 0.3, "temperature": 1.7, "hidden_weight": 0.4}
    file = write(tmp_path, tiny_data, bert, *streams, objective=changes)
    config, model, objective, batch = made(file)
    loss = objective.loss(model, batch)
    assert loss.count == objective.count(batch) == len(batch["input_ids"])
    loss.sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = reference(config, model, bert, batch)
    torch.testing.assert_close(loss.sum, expected, rtol=2e-5, atol=1e-4)
    expected.backward()
    assert {"parts.maps.0.weight", "parts.maps.1.weight"} <= found.keys()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-5 * max(scale, 1), rtol=1e-4)
    parts = {name: total.item() / max(count, 1) for name, (total, count) in loss.parts.items()}
    assert parts.keys() == {"masked", "logits", "hidden"}
    assert min(parts.values()) > 0


def test_a_teacher_of_ours_as_wide_needs_no_matrix(tiny_data: Path, ours: Path, tmp_path: Path) -> None:
    """And a model that is its teacher has nothing to learn of it."""
    file = write(tmp_path, tiny_data, ours, objective={"layers": [{"student": 2, "teacher": 2}], "share": 0.0})
    _, model, objective, batch = made(file)
    assert not hasattr(model, "parts")
    assert objective.loss(model, batch).sum > 1
    model.load_state_dict(flexbert.from_hf(ours).state_dict())
    loss = objective.loss(model.eval(), batch)
    assert float(loss.sum) == pytest.approx(0, abs=1e-2)
    loss.sum.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-2


def test_an_empty_batch_and_one_token(tiny_data: Path, bert: Path, tmp_path: Path) -> None:
    _, model, objective, _ = made(write(tmp_path, tiny_data, bert))
    for lengths, label in (([], -100), ([1], 9), ([1], -100), ([2 * ROW], 9)):
        ids = torch.full((sum(lengths),), 9)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32)
        labels = torch.full_like(ids, label)
        batch = {"input_ids": ids, "labels": labels, "cu_seqlens": bounds, "max_seqlen": sum(lengths)}
        batch |= {"masked": int((labels >= 0).sum()), "tokens": len(ids), "masking_rate": 0.3}
        loss = objective.loss(model, batch)
        assert loss.sum.isfinite()
        assert loss.count == len(ids)
        loss.sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_divergence_in_chunks_is_plain(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbert.distilling.CHUNK_ELEMENTS_DEFAULT", chunk * 50)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    drawn_bias = drawn(50)
    student, teacher = Scored(drawn(65, 8), drawn(50, 8), drawn_bias), Scored(drawn(65, 12), drawn(50, 12), None)
    found = divergence(student, teacher, 1.5)
    expected = kl(F.linear(*student), F.linear(*teacher).detach(), 1.5)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    inputs = [student.states, student.weight, drawn_bias]
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert teacher.states.grad is None


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write(folder, tiny_data, bert)))
    return folder


def checkpoint(folder: Path, phases: int) -> Path:
    return folder / "run" / "checkpoints" / f"tokens-{phases * TOKENS}"


def test_matrices_are_trained_saved_and_not_exported(straight: Path, bert: Path) -> None:
    first, last = (load_file(checkpoint(straight, phases) / KEPT[0]) for phases in (1, 2))
    names = {name for name in last if name.startswith("parts.")}
    assert names == {"parts.maps.0.weight", "parts.maps.1.weight"}, "the teacher is not saved"
    assert not any(torch.equal(first[name], last[name]) for name in names)
    config = load_run_config(straight / "train.yaml")
    model = build(config.model, seed=1)
    Objectives(config, PhasePlan(config), model)
    assert all(torch.equal(first[name], model.state_dict()[name]) for name in names), "they rest in the phase of mlm"
    exported = load_file(straight / "run" / "exports" / f"tokens-{2 * TOKENS}" / "model.safetensors")
    assert not any("maps" in name for name in exported)
    lines = [json.loads(line) for line in (straight / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert ["parts" in line for line in trained] == [False] * 3 + [True] * 3
    assert trained[-1]["parts"].keys() == {"masked", "logits", "hidden"}
    assert trained[-1]["parts"]["hidden"] < trained[3]["parts"]["hidden"]


@pytest.mark.parametrize(
    ("processes", "trainer"),
    [
        (2, {"microbatch_size": 3}),
        pytest.param(1, {"microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"parallelism": "fsdp2", "microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param(1, {"compile": True}, marks=pytest.mark.slow),
        pytest.param(1, {"microbatch_size": "auto", "activation_checkpointing": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_split_changes_only_rounding(
    ranks: Ranks, tiny_data: Path, bert: Path, straight: Path, tmp_path: Path, processes: int, trainer: dict[str, Any]
) -> None:
    """Compiled: as it was traced, which takes no compiler; test_compiled.py has one."""
    file = write(tmp_path, tiny_data, bert, trainer={"log_interval": 1, **trainer}, imports=[COUNTING])
    ranks.train(processes, str(file), extra={"COUNTS": str(tmp_path)})
    check_same(tmp_path, straight)
    ours, theirs = (
        [json.loads(line).get("parts") for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, straight)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == (None if other is None else pytest.approx(other, rel=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("event", ["batch_end", "after_backward"])
def test_killed_in_each_phase_and_on_the_border(
    ranks: Ranks, tiny_data: Path, bert: Path, straight: Path, tmp_path: Path, event: str
) -> None:
    kills = [2, 3, 4, 6]
    file = write(
        tmp_path,
        tiny_data,
        bert,
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": kills, "event": event}],
    )
    for _ in kills:
        assert ranks.run(1, "train", str(file))[0] == [-signal.SIGKILL]
    ranks.train(1, str(file))
    for name in KEPT:
        assert (checkpoint(tmp_path, 2) / name).read_bytes() == (checkpoint(straight, 2) / name).read_bytes()


def test_another_teacher_in_its_place_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    teacher = save_bert(tmp_path / "teacher", tiny_data)
    file = write(tmp_path, tiny_data, teacher)
    run = go(file)
    record = json.loads((run / "teacher.json").read_text())
    assert record["teacher"] == str(teacher)
    forget_after(tmp_path, 4)
    shutil.rmtree(teacher)
    save_bert(teacher, tiny_data, initializer_range=0.4)
    with pytest.raises(ConfigError, match=f"{teacher}: is another model than the one this run has learned from"):
        go(file)
    shutil.rmtree(teacher)
    save_bert(teacher, tiny_data)
    go(file)


def test_it_is_counted(tiny_data: Path, bert: Path, tmp_path: Path) -> None:
    """FLOPs of a forward of the teacher and of the matrices, memory and a line of the dry run."""
    file = write(tmp_path, tiny_data, bert)
    config = load_run_config(file)
    phase = PhasePlan(config).phases[1]
    lengths, masked = [20.0, 9.0], [5.0, 2.0]
    theirs = flexbert.from_hf(bert).config
    assert isinstance(theirs, FlexBertConfig)
    expected = batch_flops(config.model, lengths, masked) + batch_flops(theirs, lengths, masked) / 3
    expected += 3 * 2 * 29 * 2 * 16 * 24
    assert phase_flops(config, phase, lengths, masked) == pytest.approx(expected)
    done = CliRunner().invoke(main.app, ["train", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"beside it, not trained: {count_parameters(theirs):,} parameters in 2 layers" in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [{"student": 4, "teacher": 1}]}, "phases[1].objective: distill: layers[0].student: 4, the model has 3 blocks"),
        ({"layers": [{"student": 1}]}, "phases[1].objective.layers[0].teacher: is required"),
        ({"share": 2}, "phases[1].objective.share: "),
    ],
)  # fmt: skip
def test_what_the_file_alone_cannot_say_is_one_line(
    tiny_data: Path, bert: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write(tmp_path, tiny_data, bert, objective=changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_teachers_that_do_not_fit_are_refused(tiny_data: Path, bert: Path, tmp_path: Path) -> None:
    small = save_bert(tmp_path / "small", tiny_data, vocab_size=VOCABULARY + 1)
    short = save_bert(tmp_path / "short", tiny_data, max_position_embeddings=ROW - 1)
    other = save_bert(tmp_path / "other", tiny_data)
    text = (other / "tokenizer.json").read_text().replace('"w9"', '"x9"')
    (other / "tokenizer.json").write_text(text)
    bare = save_bert(tmp_path / "bare", tiny_data)
    (bare / "tokenizer.json").unlink()
    for teacher, layers, message in (
        (tmp_path / "nothing", LAYERS, f"objective.teacher: {tmp_path / 'nothing'}: no such folder (nothing is downloaded)"),
        (small, LAYERS, f"objective.teacher: {small}: has a vocabulary of 65, the model one of 64: set model.vocab_size=65"),
        (short, LAYERS, f"objective.teacher: {short}: reads 31 tokens, the rows have 32: shorten them"),
        (other, LAYERS, f"objective.teacher: {other}: its tokenizer is another one: 'w9' is None there, 9 in"),
        (bare, LAYERS, f"objective.teacher: {bare}: has no tokenizer.json"),
        (bert, [{"student": 1, "teacher": 3}], f"objective.layers[0].teacher: 3, {bert} has 2 blocks"),
    ):  # fmt: skip
        file = write(tmp_path / "config", tiny_data, teacher, objective={"layers": layers})
        config = load_run_config(file)
        with pytest.raises(ConfigError) as error:
            build_objectives(config, PhasePlan(config))
        assert str(error.value).startswith(message)
        for arguments in (["--dry-run"], []):
            done = CliRunner().invoke(main.app, ["train", str(file), *arguments])
            assert done.exit_code == 2, done.output
            assert message[:60] in done.output.replace("\n", "")
        assert not (tmp_path / "config" / "run").exists()


def test_the_example_learns_from_the_export_that_the_demo_writes() -> None:
    teacher = PhasePlan(demo := load_run_config(ROOT / "configs" / "demo.yaml")).total_tokens
    example = load_run_config(ROOT / "configs" / "objectives" / "distill.yaml")
    assert example.objective.teacher == f"runs/demo/exports/tokens-{teacher}"
    assert example.model.vocab_size == demo.model.vocab_size
    assert example.data == demo.data


def test_a_run_may_have_parts_of_two_objectives(tiny_data: Path, bert: Path, tmp_path: Path) -> None:
    """Each phase trains its own, and the others rest."""
    distill = {"name": "distill", "teacher": str(bert), "layers": LAYERS}
    rtd = {"name": "rtd", "generator": {"num_hidden_layers": 1}}
    objectives = ["mlm", rtd, {**rtd, "weight": 7.0}, distill, {**distill, "share": 0.4}]
    phases = [{"name": f"p{n}", "tokens": TOKENS, **SHAPE, "objective": each} for n, each in enumerate(objectives)]
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", phases=phases))
    model = build(config.model, seed=1)
    each = Objectives(config, PhasePlan(config), model).each
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    beside = {name for name in names.values() if name.startswith("parts.")}
    resting = [{names[id(p)] for p in idle_parameters(model, objective)} for objective in each]
    maps = {name for name in beside if ".maps." in name}
    assert len(maps) == 2
    assert resting[0] == beside
    assert resting[1] == resting[2] == maps | {name for name in names.values() if name.startswith("head.")}
    assert resting[3] == resting[4] == beside - maps
    assert parameters_beside(config, PhasePlan(config)) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in beside
    )


def test_phases_share_a_generator_and_a_teacher(tiny_data: Path, tmp_path: Path) -> None:
    """Built once. By the width of their token tables: 8 has the generator, 16 the detector, 24 the teacher."""
    rtd = {"name": "rtd", "generator": {"num_hidden_layers": 1, "hidden_size": 8}, "embeddings": "separate"}
    distill = {"name": "distill", "teacher": str(save_bert(tmp_path / "teacher", tiny_data)), "layers": LAYERS}
    objectives = [rtd, rtd, rtd, distill, {**distill, "share": 0.4}]
    phases = [{"name": f"p{n}", "tokens": TOKENS, **SHAPE, "objective": each} for n, each in enumerate(objectives)]
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", phases=phases))
    model, widths = build(config.model, seed=1), list[int]()

    def note(module: Any, name: str, part: Any) -> None:
        if name == "tokens" and isinstance(part, torch.nn.Embedding):
            widths.append(part.embedding_dim)

    hook = register_module_module_registration_hook(note)
    try:
        Objectives(config, PhasePlan(config), model)
    finally:
        hook.remove()
    assert sorted(widths) == [8, 16, 24]
