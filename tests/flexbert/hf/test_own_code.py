"""Architectures without a class in transformers: exported with their own code, which needs no FlexBERT."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flexbert import build, from_hf, to_hf
from flexbert.hf.convert import MODELING_FILE, transformers_config
from flexbert.hf.mappings import MAPPINGS
from flexbert.registry import SLOTS
from flexbert_core.schema import RunError
from tests.flexbert.hf.own_code import in_transformers
from tests.helpers.architectures import BERT, CASES, IDS, LEARNED, PARALLEL, SANDWICH
from tests.helpers.models import ODD_LENGTHS, batch_of, scrambled, tiny
from tests.helpers.tokenizer import tokenizer_of

# Measured worst case: 3.3e-6 on logits up to 9
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_modeling_file_computes_what_the_library_does(case: str) -> None:
    model = scrambled(build(tiny(**CASES[case])))
    theirs = in_transformers(model)
    batch = batch_of(ODD_LENGTHS)
    ids = nn.utils.rnn.pad_sequence(batch.split(), batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in batch.split()], batch_first=True)
    for flip in (False, True):  # padding right, padding left
        order = [torch.arange(200).roll(200 - len(s)) if flip else torch.arange(200) for s in batch.split()]
        turned = torch.stack(order)
        output = theirs(ids.gather(1, turned), mask.gather(1, turned), labels=None)
        ours = model(*batch[:3])
        logits = output.logits[mask.gather(1, turned).bool()]
        assert logits.abs().max() > 1
        torch.testing.assert_close(logits, ours.logits, atol=TOLERANCE, rtol=0)
    labels = torch.full_like(ids, -100).masked_scatter(mask.bool(), batch.labels)
    torch.testing.assert_close(theirs(ids, mask, labels=labels).loss, model(*batch).loss, atol=TOLERANCE, rtol=0)


def test_token_types_and_hidden_states_of_the_modeling_file() -> None:
    model = scrambled(build(tiny(**SANDWICH)))
    theirs = in_transformers(model)
    batch = batch_of((30,))
    types = (batch.input_ids % 2).long()
    output = theirs(batch.input_ids[None], token_type_ids=types[None], output_hidden_states=True)
    ours = model(*batch[:3], token_type_ids=types)
    torch.testing.assert_close(output.logits[0], ours.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.hidden_states[-1][0], ours.hidden_states, atol=TOLERANCE, rtol=0)
    assert len(output.hidden_states) == 5
    with pytest.raises(ValueError, match="longer than the 256 learned positions"):
        in_transformers(build(tiny(**LEARNED)))(torch.zeros(1, 257, dtype=torch.int64))


def test_the_modeling_file_knows_every_component_of_the_package() -> None:
    from flexbert.hf.modeling_flexbert import SUPPORTED

    for slot, names in SUPPORTED.items():
        of_package = {name for name, entry in SLOTS[slot].entries.items() if entry.__module__.startswith("flexbert.")}
        serves_export = {name for name in of_package if slot != "head" or SLOTS[slot].entries[name].task == "mlm"}
        assert names == serves_export, slot


# Writes an export, with code of its own, of a model with an activation. It is loaded back without FlexBERT.
WITH_TWIST = """
import sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from flexbert import FlexBertConfig, build, to_hf
sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
model = build(FlexBertConfig.from_dict({**sizes, "norm": "rmsnorm", "mlp": {"name": "glu", "activation": "twist"}}))
tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
to_hf(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), sys.argv[1])
"""


@pytest.mark.slow
def test_a_new_activation_is_one_line_in_one_file(tmp_path: Path) -> None:
    for room in ("flexbert", "flexbert_core"):
        shutil.copytree(Path(__file__).parents[3] / room, tmp_path / room)
    file, table = tmp_path / "flexbert" / "activations.py", "FUNCTIONS: dict[str, Any] = {\n"
    assert table in file.read_text()
    line = '    "twist": lambda states: states * torch.sin(states),\n'
    file.write_text(file.read_text().replace(table, table + line))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", WITH_TWIST, "export"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "activations.py").read_text() == file.read_text()


LOAD = """
import sys, importlib.util, torch
assert importlib.util.find_spec("flexbert") is None
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(40)[None] + 5
output = model(input_ids=ids, output_hidden_states=True)
states = encoder(**{"input_ids": ids}).last_hidden_state
assert torch.equal(states, output.hidden_states[-1])
assert model.config.hidden_size == 48 and model.config.pad_token_id == 3
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(folder)
print(repr(output.logits.double().sum().item()))
"""


def test_an_export_with_code_loads_where_flexbert_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(**SANDWICH, **IDS)
    model = scrambled(build(config))
    with caplog.at_level(logging.INFO, logger="flexbert.hf"):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    assert "norm: 'rmsnorm' has no counterpart in Hugging Face's ModernBERT, only 'layernorm'" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    arguments = [sys.executable, "-I", "-c", LOAD, str(tmp_path / "export"), str(tmp_path / "again")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(40) + 5
    ours = model(ids, torch.tensor([0, 40], dtype=torch.int32), 40).logits
    assert ours is not None
    assert float(done.stdout.split()[-1]) == pytest.approx(ours.double().sum().item(), abs=1e-2)
    for folder in ("export", "again"):  # ours, and what transformers saved from it
        read = from_hf(tmp_path / folder)
        assert read.config == config.model_copy(update={"init": read.config.init})
        assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    encoder = from_hf(tmp_path / "export", task="encoder")
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in model.encoder.state_dict().items())
    assert "trust_remote_code=True" in (tmp_path / "export" / "README.md").read_text()


def test_roberta_with_another_padding_id_is_not_passed_off_as_one() -> None:
    """transformers' RoBERTa starts its positions behind the padding id, so 2 rows of offset need the padding id 1."""
    changes = {**BERT, "position": {"name": "learned", "offset": 2}, "head": {"name": "mlm", "dense_bias": True}}
    config = tiny(**changes)
    assert transformers_config(config, {"pad_token_id": 1})[1] == MAPPINGS["roberta"]
    for pad in (0, 2, 3, None):
        exported, mapping = transformers_config(config, {"pad_token_id": pad})
        assert mapping is None
        assert exported.model_type == "flexbert"


@pytest.mark.slow
def test_an_export_whose_code_fails_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "code" / "modeling_flexbert.py"
    broken.parent.mkdir()
    broken.write_text("import flexbert\n")
    monkeypatch.setattr("flexbert.hf.convert.MODELING_FILE", broken)
    with pytest.raises(RunError, match=r"cannot load the export: .*flexbert.*: not published"):
        to_hf(build(tiny(**PARALLEL)), tokenizer_of(97), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


@pytest.mark.slow  # another process that imports torch and transformers
def test_an_export_whose_code_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "code" / "modeling_flexbert.py"
    other.parent.mkdir()
    text = MODELING_FILE.read_text()
    assert "(distance <= window)" in text
    other.write_text(text.replace("(distance <= window)", "(distance < window)"))
    monkeypatch.setattr("flexbert.hf.convert.MODELING_FILE", other)
    with pytest.raises(RunError, match=r"export's logits differ from the model's by .*: not published"):
        to_hf(build(tiny(**PARALLEL)), tokenizer_of(97), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
