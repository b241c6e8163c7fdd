"""Own-code exports in transformers 5: `make smoke-next`, in its environment. Not part of `make test`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import AutoModelForTokenClassification as ForTokens

from flexbert import build, from_hf, to_hf
from tests.flexbert.hf.own_code import inputs
from tests.helpers.architectures import IDS, PARALLEL, SANDWICH
from tests.helpers.models import batch_of, scrambled, tiny
from tests.helpers.tokenizer import tokenizer_of

PYTHON_OF_4 = Path(__file__).parents[3] / ".venv" / "bin" / "python"
CONFIGS = {"untied": SANDWICH, "tied": PARALLEL}
ARGUMENTS: Any = {"trust_remote_code": True, "local_files_only": True}

# Loads the folder with transformers 4 and with FlexBERT, and prints the sums of their logits.
LOAD_IN_4 = """
import sys, torch, transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer
from flexbert import from_hf
assert transformers.__version__.startswith("4."), transformers.__version__
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True).eval()
ids = torch.arange(40) + 5
print(model(ids[None]).logits.double().sum().item())
print(from_hf(sys.argv[1]).eval()(ids, torch.tensor([0, 40], dtype=torch.int32), 40).logits.double().sum().item())
"""


@pytest.fixture(scope="module", params=CONFIGS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and its export, which was verified in this transformers. Nobody was there to answer a question."""
    assert transformers.__version__.startswith("5."), transformers.__version__
    folder = tmp_path_factory.mktemp(request.param) / "export"
    model = scrambled(build(tiny(**CONFIGS[request.param], **IDS)))
    to_hf(model, tokenizer_of(97), folder)
    return model, folder


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(question: str = "") -> str:
        pytest.fail(f"a question on stdin: {question}")

    monkeypatch.setattr("builtins.input", asked)


def test_it_loads_and_computes_the_same(export: tuple[Any, Path]) -> None:
    model, folder = export
    batch = batch_of((30,))
    expected = model(*batch[:3]).logits
    for kernel in ("sdpa", "eager"):
        loaded = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=kernel, **ARGUMENTS).eval()
        output = loaded(batch.input_ids[None], output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(output.logits[0], expected, atol=1e-5, rtol=0)
        assert len(output.attentions) == 4
    encoder = AutoModel.from_pretrained(folder, **ARGUMENTS).eval()
    states = encoder(batch.input_ids[None]).last_hidden_state
    torch.testing.assert_close(states, output.hidden_states[-1], atol=1e-5, rtol=0)
    assert len(AutoTokenizer.from_pretrained(folder, **ARGUMENTS)) == 97
    with pytest.raises(ValueError, match="(?i)flash"):
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="flash_attention_2", **ARGUMENTS)


def test_the_tokenizer_loads_where_code_may_not_run(export: tuple[Any, Path]) -> None:
    assert len(AutoTokenizer.from_pretrained(export[1], trust_remote_code=False)) == 97
    command = (
        "import sys; from transformers import AutoTokenizer; print(len(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", command, export[1]], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout.split()[-1] == "97", done.stderr


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_learns(export: tuple[Any, Path], checkpointing: bool) -> None:
    for auto, labels in (
        (AutoModelForMaskedLM, inputs()["labels"]),
        (AutoModelForSequenceClassification, torch.tensor([0, 1, 0, 1, 1])),
        (ForTokens, inputs()["labels"].clamp(max=1)),
    ):
        torch.manual_seed(0)
        model = auto.from_pretrained(export[1], **ARGUMENTS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = model(**inputs() | {"labels": labels}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], (auto, losses)


def test_resized_saved_in_several_files_and_read_everywhere(export: tuple[Any, Path], tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(export[1], **ARGUMENTS).eval()
    model.resize_token_embeddings(120)
    ids = (torch.arange(40) + 5)[None]
    logits = model(ids).logits
    assert logits.shape[-1] == 120
    for folder, limit in (("one", "1GB"), ("several", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=limit)
        again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / folder, output_loading_info=True, **ARGUMENTS)
        assert not info["missing_keys"] | info["unexpected_keys"]
        assert torch.equal(again.eval()(ids).logits, logits)
        ours = from_hf(tmp_path / folder).eval()
        packed = ours(ids[0], torch.tensor([0, 40], dtype=torch.int32), 40).logits
        torch.testing.assert_close(packed, logits[0], atol=1e-5, rtol=0)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    if not PYTHON_OF_4.exists():
        pytest.skip("no .venv with transformers 4 beside this one")
    for folder in ("one", "several"):
        done = subprocess.run(
            [PYTHON_OF_4, "-c", LOAD_IN_4, tmp_path / folder],
            env={**os.environ, "PYTHONPATH": str(PYTHON_OF_4.parents[2]), "HF_MODULES_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for line in done.stdout.split():
            assert float(line) == pytest.approx(logits.double().sum().item(), abs=1e-2)


def test_half_precision_and_a_fresh_head(export: tuple[Any, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(export[1], dtype=torch.bfloat16, **ARGUMENTS).eval()
    assert model(**inputs()).logits.isfinite().all()
    assert model.dtype == torch.bfloat16
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(export[1], num_labels=5, **ARGUMENTS)
    assert classifier.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not classifier.head.dense.bias.any()
    assert classifier.head.classifier.weight.shape == (5, 48)
