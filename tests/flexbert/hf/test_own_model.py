"""The modeling file under what transformers asks of its own models (ModelTesterMixin of 4.57, as far as it applies).

What of that list does not apply, and why: generation, caches, past keys, beam search: not a decoder. Flash attention, flex
attention, static attention kernels, context and tensor parallel plans: refused, they are not there. Head pruning, head
masks, feed-forward chunking: refused. TensorFlow, Flax, torch.fx, DeepSpeed, bitsandbytes, several GPUs: not here.
Encoder-decoder and cross-attention: not such a model; refused. Fast initialisation from `_init_weights` flags alone is
tested through what it is for: the weights of new heads.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from flexbert import build, from_hf
from flexbert.hf import modeling_flexbert as modeling
from flexbert.hf.convert import transformers_config
from tests.flexbert.hf.own_code import GRADIENTS, LENGTHS, LOGITS, TASKS, close, in_transformers, inputs, own
from tests.helpers.architectures import PARALLEL, SANDWICH
from tests.helpers.models import batch_of, equal, gradients, tiny
from tests.helpers.presets import PRESET_NAMES, small


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_logits_and_gradients_are_those_of_the_packed_model(preset: str, attention: str) -> None:
    model = small(preset)
    theirs = in_transformers(model, attn_implementation=attention)
    batch = batch_of(LENGTHS)
    expected = model(*batch[:3]).logits
    model(*batch).loss.backward()
    for left in (False, True):
        given = inputs(left)
        theirs.zero_grad()
        output = theirs(**given)
        assert output.logits.isfinite().all()
        close(output.logits[given["attention_mask"].bool()], expected, LOGITS)
        output.loss.backward()
        named = dict(theirs.named_parameters())
        for name, gradient in gradients(model).items():
            close(named[name].grad, gradient, GRADIENTS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "config", [SANDWICH, PARALLEL, {"position": "learned"}], ids=["sandwich", "parallel", "learned"]
)
def test_saved_in_one_file_or_several_it_loads_equal(config: Any, task: str, tmp_path: Path) -> None:
    model = own(task, config)
    ids = inputs()["input_ids"]
    for folder, limit in (("one", "1GB"), ("several", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=limit)
        again, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert equal(again, model)
        close(again.eval()(ids)[0], model(ids)[0])
        ours = from_hf(tmp_path / folder, task="mlm" if task == "mlm" else "encoder")
        batch = batch_of((30,))
        packed = ours.eval()(*batch[:3])
        mine = model.base_model(batch.input_ids[None]).last_hidden_state[0]
        close(packed.hidden_states if task == "mlm" else packed, mine)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1


def test_a_tied_decoder_is_saved_once_and_an_untied_one_by_itself(tmp_path: Path) -> None:
    for config, names in ((PARALLEL, set()), (SANDWICH, {"head.output.weight"})):
        model = own(config=config)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (not names)
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            saved = set(file.keys())
        assert saved == set(build(tiny(**config)).state_dict())
        assert {name for name in saved if "output.weight" in name} == names


@pytest.mark.parametrize("size", [120, 64])
@pytest.mark.parametrize("config", [PARALLEL, SANDWICH, {"position": "alibi"}], ids=["tied", "untied", "biased"])
def test_a_resized_vocabulary_is_one_everywhere(config: Any, size: int, tmp_path: Path) -> None:
    model = own(config=config)
    ids = inputs(vocab=60)["input_ids"]
    before = model(ids).logits.detach()  # a graph of the old table must not live on: transformers changes it in place
    bias = model.head.decoder_bias
    table = model.resize_token_embeddings(size)
    assert table is model.get_input_embeddings()
    assert table.num_embeddings == size
    assert model.config.vocab_size == model.config.flexbert["vocab_size"] == model.get_output_embeddings().out_features
    after = model(ids).logits.detach()
    assert after.shape[-1] == size
    close(after[..., : min(size, 97)], before[..., :size])
    if bias is not None:
        assert torch.equal(model.head.decoder_bias[:97], bias[:size])
        close(model.head.decoder_bias[97:], bias.mean().expand(max(size - 97, 0)))
    F.cross_entropy(model(ids + size - 60).logits.flatten(0, 1), ids.flatten() + size - 60).backward()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings == tiny(**config).head.tied
    assert equal(again, model)
    close(again(ids).logits, after)
    ours = from_hf(tmp_path).eval()
    assert ours.config.vocab_size == size
    batch = batch_of((30,), 60)
    close(ours(*batch[:3]).logits, model(batch.input_ids[None]).logits[0])  # pyright: ignore


def test_an_encoder_is_resized_too_and_a_multiple_is_kept() -> None:
    model = own("encoder")
    model.resize_token_embeddings(98, pad_to_multiple_of=64)
    assert model.config.flexbert["vocab_size"] == 128 == model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=r"head\.decoder_bias"):
        own().set_output_embeddings(nn.Linear(48, 97))


def test_sizes_and_the_architecture_cannot_disagree(tmp_path: Path) -> None:
    node = tiny(**PARALLEL).to_dict()
    config = modeling.FlexBertConfig(node)
    config.hidden_size, config.tie_word_embeddings = 96, False
    assert (config.flexbert["hidden_size"], config.flexbert["head"]["tied"]) == (96, False)
    assert node["hidden_size"] == 48, "the caller's own node was changed"
    config.save_pretrained(tmp_path)
    again = modeling.FlexBertConfig.from_pretrained(tmp_path)
    assert (again.hidden_size, again.tie_word_embeddings, again.flexbert) == (96, False, config.flexbert)
    for given in ({"vocab_size": 70}, {"num_hidden_layers": 3}, {"tie_word_embeddings": False}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}: .* but flexbert says .*: they must agree"):
            modeling.FlexBertConfig(node, **given)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("task", ["mlm", "sequence"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(task: str, reentrant: bool) -> None:
    model = own(task, {**SANDWICH, "embedding": {**SANDWICH["embedding"], "dropout": 0.1}}).train()
    given = inputs() | ({} if task == "mlm" else {"labels": torch.tensor([0, 1, 0, 1, 1])})
    calls = []
    model.encoder.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        calls.clear()
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**given).loss
        loss.backward()
        assert len(calls) == 1 + checkpointing
        found.append((loss, {name: gradient.clone() for name, gradient in gradients(model).items()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        close(gradient, found[1][1][name])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


class Adapter(nn.Module):
    """What LoRA does to a linear layer: its output plus a product of two small matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + self.up(self.down(states))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")  # since torch 2.8; it still works
@pytest.mark.parametrize("config", [PARALLEL, SANDWICH], ids=["tied", "untied"])
def test_every_linear_layer_can_be_wrapped_and_quantised(config: Any) -> None:
    model, ids = own(config=config), inputs()["input_ids"]
    plain = model(ids).logits
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert "head.output" in names
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    logits = quantised(ids).logits
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.2
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapter(model.get_submodule(name)))  # pyright: ignore
    model(ids, labels=ids).loss.backward()
    for name in names:
        assert model.get_submodule(name).up.weight.grad.any(), name  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["modernbert-tiny", "mosaicbert-base", "neobert", "nomicbert-base", "academicbert"])
def test_half_precision_is_near_and_finite(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, given = in_transformers(small(preset)), inputs()
    expected = theirs(**given).logits
    theirs.save_pretrained(tmp_path)
    loaded = type(theirs).from_pretrained(tmp_path, dtype=dtype).eval()
    real = given["attention_mask"].bool()
    for kernel in ("sdpa", "eager"):
        loaded.set_attn_implementation(kernel)
        logits = loaded(**given).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        # Measured: 0.05 in bfloat16 (8 bits), with weights of standard deviation 0.2
        assert float((logits.float() - expected)[real].norm() / expected[real].norm()) < 0.1
    assert torch.equal(
        theirs.half()(**given).logits[real].isfinite(), torch.ones_like(expected[real], dtype=torch.bool)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert theirs.float()(**given).logits.isfinite().all()


def test_it_loads_without_a_first_copy_and_on_a_device_map(tmp_path: Path) -> None:
    model, ids = own(), inputs()["input_ids"]
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    again = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=True).eval()
    assert equal(again, model)
    close(again(ids)[0], model(ids)[0])


def test_new_weights_are_drawn_for_what_they_are() -> None:
    model = TASKS["mlm"](modeling.FlexBertConfig(tiny(**SANDWICH).to_dict(), initializer_range=0.01))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.std()) == pytest.approx(0.01, rel=0.2), name
        elif name.endswith("activation.weight"):
            assert float(parameter) == 0.25
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and name.endswith("weight"))))
    scale = TASKS["encoder"](
        modeling.FlexBertConfig(tiny(position={"name": "sinusoidal", "learned_scale": True}).to_dict())
    )
    assert float(scale.position.scale) == pytest.approx(48**-0.5)


def test_dropout_acts_in_training_only_and_evaluation_repeats_itself() -> None:
    config = {
        **PARALLEL,
        "attention": {"probs_dropout": 0.2, "out_dropout": 0.2},
        "mlp": {"name": "glu", "out_dropout": 0.2},
    }
    for kernel in ("eager", "sdpa"):
        model, ids = own(config=config, attn_implementation=kernel), inputs()["input_ids"]
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert not torch.equal(model.train()(ids).logits, model(ids).logits)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # as trainers switch it off
                module.p = 0.0
        close(model(ids).logits, model.eval()(ids).logits)


# A trace keeps what Python decides on shapes: it says so of each decision.
@pytest.mark.filterwarnings("default::torch.jit.TracerWarning")
def test_a_graph_can_be_traced_and_exported() -> None:
    for config in (SANDWICH, PARALLEL, {"position": "learned"}):
        model, given = own(config=config), inputs()
        ids, mask = given["input_ids"], given["attention_mask"]
        expected = model(ids, mask).logits
        graph = torch.export.export(model, (ids, mask), strict=False)
        close(graph.module()(ids, mask).logits, expected)
    traced = torch.jit.trace(own(torchscript=True), (ids, mask))  # pyright: ignore
    close(traced(ids, mask)[0], own()(ids, mask).logits)  # pyright: ignore


def test_exports_name_every_class(tmp_path: Path) -> None:
    config, mapping = transformers_config(tiny(**SANDWICH), {"pad_token_id": 3})
    assert mapping is None
    config.save_pretrained(tmp_path)
    for auto, name in modeling.FlexBertConfig.from_pretrained(tmp_path).auto_map.items():
        assert getattr(modeling, name.removeprefix("modeling_flexbert.")).__name__.startswith("FlexBert"), auto
    assert len(config.auto_map) == 5
