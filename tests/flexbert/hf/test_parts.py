"""Parts from outside travel in exports: the files in examples/, loaded where neither they nor FlexBERT are."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexbert import FlexBertConfig, build, from_hf, to_hf
from flexbert.hf import parts
from flexbert.registry import SLOTS
from flexbert_core.schema import ConfigError
from recipe.imports import import_components
from tests.helpers.architectures import IDS
from tests.helpers.models import Batch, batch_of, gradients
from tests.helpers.registries import registries_as_before
from tests.helpers.tokenizer import tokenizer_of

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL |= {"max_position_embeddings": 64, "init": {"name": "full_megatron", "std": 0.2}}
# Each part from outside is in one of them.
MODELS: dict[str, dict[str, Any]] = {
    "first": {
        "norm": {"name": "scale_norm", "eps": 1e-6},
        "mlp": {"name": "maxout", "out_dropout": 0.1},
        "initial_layers": {"count": 1, "attention": "mean"},
        "position": "log_buckets",
    },
    "second": {
        "block": {"name": "rezero", "start": 0.5},
        "mlp": {"name": "glu", "activation": "squareplus"},
        "attention": {"name": "multihead", "qk_norm": "scale_norm", "backend": "eager"},
        "embedding": "gated",
        "head": {"name": "cosine", "scale": 4.0},
        "loss": {"name": "focal", "gamma": 0.0},
    },
}
FILES = {
    "first": ["log_position.py", "maxout.py", "mean_attention.py", "scale_norm.py"],
    "second": ["cosine_head.py", "gated_embedding.py", "rezero.py", "scale_norm.py", "squareplus.py"],
}


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    """What a test registers is of no concern to the others."""
    with registries_as_before():
        yield


def imported(folder: Path, *files: str) -> None:
    """As by `imports:` of a run file in the folder."""
    import_components({"imports": list(files)}, folder / "run.yaml")


def model_of(change: dict[str, Any]) -> Any:
    return build(FlexBertConfig.from_dict({**SMALL, **IDS, **change}), seed=1).eval()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of each model, and what it computes of a batch."""
    root = tmp_path_factory.mktemp("exports")
    with registries_as_before():
        imported(EXAMPLES, *{file for files in FILES.values() for file in files}, "focal_loss.py")
        write_exports(root)
    return root


def write_exports(root: Path) -> None:
    for name, change in MODELS.items():
        model, batch = model_of(change), batch_of((1, 30, 17), vocab_size=96)
        to_hf(model, tokenizer_of(96), root / name, card="# A card\n")
        output = model(*batch)
        output.loss.backward()
        found = {f"gradient:{key}": value for key, value in gradients(model).items()}
        found |= {"logits": model(*batch[:3]).logits, "loss": output.loss, "input_ids": batch.input_ids}
        found |= {"labels": batch.labels, "lengths": batch.cu_seqlens.diff()}
        save_file({key: value.detach().contiguous() for key, value in found.items()}, root / f"{name}.safetensors")


LOAD = """
import importlib.util, sys, torch
from pathlib import Path
assert all(importlib.util.find_spec(name) is None for name in ("flexbert", "flexbert_core", "scale_norm", "recipe"))
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import AutoModelForTokenClassification
from torch.nn.utils.rnn import pad_sequence
trust = {"trust_remote_code": True, "local_files_only": True}
for name in ("first", "second"):
    folder, expected = Path(sys.argv[1]) / name, load_file(Path(sys.argv[1]) / f"{name}.safetensors")
    lengths = expected["lengths"].tolist()
    def padded(values, fill):
        return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)
    ids, labels = padded(expected["input_ids"], 3), padded(expected["labels"], -100)
    mask = padded(torch.ones_like(expected["input_ids"]), 0)
    model = AutoModelForMaskedLM.from_pretrained(folder, **trust)
    again = Path(sys.argv[2]) / name
    model.save_pretrained(again)
    for each in (model.eval(), AutoModelForMaskedLM.from_pretrained(again, **trust).eval()):
        output = each(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        torch.testing.assert_close(output.logits[mask.bool()], expected["logits"], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.loss, expected["loss"], atol=1e-5, rtol=0)
        output.loss.backward()
        gradients = {key: each.grad for key, each in each.named_parameters()}
        assert {f"gradient:{key}" for key in gradients} == {key for key in expected if key.startswith("gradient:")}
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[f"gradient:{key}"], atol=1e-5, rtol=1e-4)
    encoder = AutoModel.from_pretrained(folder, **trust).eval()
    assert torch.equal(encoder(ids, mask).last_hidden_state, output.hidden_states[-1])
    assert len(output.hidden_states) == 3
    for kind, shape in ((AutoModelForSequenceClassification, (3, 5)), (AutoModelForTokenClassification, (3, 30, 5))):
        classifier = kind.from_pretrained(folder, num_labels=5, **trust).eval()
        scores = classifier(ids, mask).logits
        assert scores.shape == shape and scores.isfinite().all() and scores.std() > 0
        classifier.save_pretrained(again)
        assert torch.equal(kind.from_pretrained(again, **trust).eval()(ids, mask).logits, scores)
    assert len(AutoTokenizer.from_pretrained(folder)) == 96
    for refused in ({"position_ids": ids}, {"output_attentions": True}):
        try:
            model(ids, **refused)
        except ValueError as error:
            assert next(iter(refused)) in str(error)
        else:
            raise AssertionError(refused)
assert not any(name.split(".")[0] in ("flexbert", "flexbert_core") for name in sys.modules)
"""


def fresh(code: str, *arguments: Any, home: Path) -> subprocess.CompletedProcess[str]:
    """Run in a process whose sys.path has neither FlexBERT nor the parts."""
    environment = {"HF_MODULES_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "LD_"))}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)


FROM_HUB = """
import sys, torch
from transformers import AutoModelForMaskedLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
get_class_from_dynamic_module("modeling_with_parts.FlexBertForMaskedLM", sys.argv[1])  # before any config was loaded
ids = torch.arange(10)[None] + 5
models = [AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True) for name in (sys.argv[1], "someone/second")]
assert torch.equal(*[model.eval()(ids).logits for model in models])
"""


@pytest.mark.slow
def test_it_loads_from_the_hub(exports: Path, tmp_path: Path) -> None:
    """As transformers finds it in the hub's cache: it asks of each file of code for what that imports."""
    repository = tmp_path / ".cache" / "huggingface" / "hub" / "models--someone--second"
    commit = "0123456789" * 4
    shutil.copytree(exports / "second", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = fresh(FROM_HUB, exports / "second", home=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_each_part_from_outside_computes_the_same_where_flexbert_is_not(exports: Path, tmp_path: Path) -> None:
    done = fresh(LOAD, exports, tmp_path / "again", home=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_files_travel_and_are_listed(exports: Path, name: str) -> None:
    node = json.loads((exports / name / "config.json").read_text())
    digests = {file: sha256((EXAMPLES / file).read_bytes()).hexdigest() for file in FILES[name]}
    assert node["parts"] == digests
    card = (exports / name / "README.md").read_text()
    assert card.startswith("# A card\n")
    for file, digest in digests.items():
        assert (exports / name / file).read_bytes() == (EXAMPLES / file).read_bytes()
        assert f"| {file} | {digest} |" in card


@pytest.mark.slow
def test_from_hf_runs_code_of_a_folder_by_consent_alone(exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "first", tmp_path / "export")
    with pytest.raises(ConfigError, match=r"(?s)scale_norm.*parts of .*scale_norm\.py.*trust_remote_code=True"):
        from_hf(folder)
    assert "scale_norm" not in SLOTS["norm"].entries
    model = from_hf(folder, trust_remote_code=True).eval()
    imported(tmp_path)  # nothing
    batch: Batch = batch_of((9, 20), vocab_size=96)
    logits = model(*batch[:3]).logits
    assert torch.equal(
        from_hf(folder, trust_remote_code=True).eval()(*batch[:3]).logits, logits
    )  # not registered twice
    assert from_hf(folder).eval()(*batch[:3]).logits.equal(logits)  # they are registered by now


@pytest.mark.slow
def test_a_file_that_was_changed_is_not_run(exports: Path, tmp_path: Path) -> None:
    for file, match in (
        ("scale_norm.py", "scale_norm.py: its scale_norm.py"),
        (parts.SOURCES_FILE, parts.SOURCES_FILE),
    ):
        folder = shutil.copytree(exports / "first", tmp_path / file)
        text = (folder / file).read_text()
        assert "clamp_min(self.eps)" in text
        (folder / file).write_text(text.replace("clamp_min(self.eps)", "clamp_min(2 * self.eps)"))
        with pytest.raises(ConfigError, match=rf"{match}.* is not the one that config.json has the sha256 of: not run"):
            from_hf(folder, trust_remote_code=True)
        assert "scale_norm" not in SLOTS["norm"].entries
    done = fresh(f"""
from transformers import AutoModel
AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True, local_files_only=True)
""", home=tmp_path)  # fmt: skip
    assert "scale_norm.py: in flexbert_sources.py is not the part that config.json has the sha256 of" in done.stderr


@pytest.mark.slow
def test_another_file_of_the_name_is_said(exports: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (EXAMPLES / "scale_norm.py").read_text()
    (tmp_path / "scale_norm.py").write_text(text.replace("/ lengths", "/ (2 * lengths)"))
    imported(tmp_path, "scale_norm.py")
    imported(EXAMPLES, *set(FILES["first"]) - {"scale_norm.py"})
    from_hf(exports / "first")
    assert f"{tmp_path / 'scale_norm.py'}: registers parts here, and is not the file of this name" in caplog.text
    with pytest.raises(ConfigError, match="scale_norm.py: ValueError: norm 'scale_norm' is registered twice"):
        from_hf(exports / "first", trust_remote_code=True)


NORM = """
import torch
from torch import nn
from flexbert import register
from flexbert_core.schema import Component
{imports}

@register("norm", "{name}")
class Norm(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config, *, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_buffer("table", torch.linspace(0.5, 1.5, hidden_size), persistent=False)
        self.plain = torch.linspace(1.5, 0.5, hidden_size)

    def forward(self, states):
        states = torch.nn.functional.normalize(states, dim=-1)
        return states * self.weight * self.table * self.plain * {factor}
"""


def part(folder: Path, name: str, imports: str = "", factor: str = "1.0") -> FlexBertConfig:
    """A config with a norm from a file of the folder, imported as by a run file."""
    (folder / f"{name}.py").write_text(NORM.format(name=name, imports=imports, factor=factor))
    imported(folder, f"{name}.py")
    return FlexBertConfig.from_dict({**SMALL, **IDS, "norm": name})


@pytest.mark.slow
def test_files_beside_a_part_travel_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own name and as of a folder; and texts with every kind of quote and line end stay what they are."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "beside_it.py").write_bytes(b"'''It\\'s \\\\ \"quoted\"'''\r\nFACTOR = 3.0  # \xc3\xa9 '''\x0c\n# '")
    (tmp_path / "lib" / "of_folder.py").write_text("from lib.other import TWO\nFACTOR = 2.0 * TWO\n")
    (tmp_path / "lib" / "other.py").write_text("import lib.other\nTWO = len('ab')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = part(tmp_path, "with_neighbour", "import math, beside_it", "beside_it.FACTOR * math.cos(0)")
    second = part(tmp_path / "lib", "in_folder", "from lib import of_folder", "of_folder.FACTOR")
    assert set(parts.parts_of(first).files) == {"with_neighbour.py", "beside_it.py"}
    assert set(parts.parts_of(second).files) == {"in_folder.py", "lib/of_folder.py", "lib/other.py"}
    config = first.model_copy(
        update={"mlp": FlexBertConfig.from_dict({**SMALL, "mlp": {"name": "glu", "inner_norm": "in_folder"}}).mlp}
    )
    model = build(config, seed=1)
    to_hf(model, tokenizer_of(96), tmp_path / "export")  # which compares the logits, where none of the files is
    assert (tmp_path / "export" / "lib" / "other.py").is_file()
    assert (tmp_path / "export" / "beside_it.py").read_bytes() == (tmp_path / "beside_it.py").read_bytes()


def test_what_cannot_travel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far_away.py").write_text("FACTOR = 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    cases = {
        "of_elsewhere": ("import far_away", r"imports far_away .*far_away\.py.*only \.py files beside it travel"),
        "of_trainer": (
            "from recipe.slots import CALLBACKS",
            r"imports recipe\.slots .*only \.py files beside it travel",
        ),
        "of_border": (
            "import flexbert.hf.convert",
            r"imports flexbert\.hf\.convert .*only \.py files beside it travel",
        ),
        "activations": ("", r"activations\.py: is the name of a file of every export: rename it"),
    }
    for name, (imports, match) in cases.items():
        with pytest.raises(ConfigError, match=match) as caught:
            parts.parts_of(part(tmp_path, name, imports))
        assert len(str(caught.value).splitlines()) == 1
        if imports:
            assert f"norm: {name!r}" in str(caught.value)


def test_a_part_of_no_file_is_named(tmp_path: Path) -> None:
    exec(NORM.format(name="typed_in", imports="", factor="1.0"), {"__name__": "__main__"})
    with pytest.raises(ConfigError, match=r"norm: 'typed_in' is in no export: it was registered by __main__"):
        parts.parts_of(FlexBertConfig.from_dict({**SMALL, "norm": "typed_in"}))
    attention = {"name": "multihead", "qk_norm": "typed_in"}
    with pytest.raises(ConfigError, match=r"attention\.qk_norm: 'typed_in' is in no export"):
        parts.parts_of(FlexBertConfig.from_dict({**SMALL, "attention": attention}))


def test_packages_that_pip_installs_are_needed_and_not_carried(tmp_path: Path) -> None:
    imports = "import yaml\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nowhere\n"
    imports += "try:\n    import fast_but_absent\nexcept ImportError:\n    pass\n"
    found = parts.parts_of(part(tmp_path, "with_packages", imports))
    assert (found.packages, list(found.files)) == (["yaml"], ["with_packages.py"])
    assert "They need\ntorch, transformers, pydantic, yaml." in parts.card(found)


def test_a_function_of_another_library_is_of_the_file_that_registers_it(tmp_path: Path) -> None:
    (tmp_path / "erf.py").write_text(
        "import torch\nfrom flexbert import register\nregister('activation', 'erf')(torch.erf)\n"
    )
    imported(tmp_path, "erf.py")
    config = FlexBertConfig.from_dict({**SMALL, "head": {"name": "mlm", "activation": "erf"}})
    assert parts.parts_of(config).places == {"head.activation: 'erf'": "erf.py"}


def test_a_file_that_is_edited_while_the_run_goes_on_travels_as_it_was(tmp_path: Path) -> None:
    config = part(tmp_path, "edited")
    before = parts.parts_of(config).files["edited.py"]
    (tmp_path / "edited.py").write_text("raise SystemExit\n")
    assert parts.parts_of(config).files["edited.py"] == before


def test_losses_and_starting_weights_need_not_travel() -> None:
    imported(EXAMPLES, "focal_loss.py", "orthogonal_init.py")
    config = FlexBertConfig.from_dict({**SMALL, "loss": {"name": "focal", "gamma": 1.0}, "init": "orthogonal"})
    assert parts.parts_of(config).files == {}


@pytest.mark.slow
def test_what_a_part_keeps_beside_its_weights_is_there_again(tmp_path: Path) -> None:
    """Buffers that are not saved, and plain tensors: from_hf and the mean of checkpoints allocate no weights first."""
    model = build(part(tmp_path, "keeps_tables"), seed=1).eval()
    to_hf(model, tokenizer_of(96), tmp_path / "export")
    batch = batch_of((1, 30, 17), vocab_size=96)
    found = from_hf(tmp_path / "export", trust_remote_code=True).eval()
    torch.testing.assert_close(found(*batch[:3]).logits, model(*batch[:3]).logits)


@pytest.mark.parametrize("relative", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_part_of_a_package_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    name = f"package_{relative}".lower()
    (tmp_path / name).mkdir()
    (tmp_path / name / "helper.py").write_text("FACTOR = 2.0\n")
    imports = f"from {'.helper' if relative else f'{name}.helper'} import FACTOR"
    (tmp_path / name / "__init__.py").write_text(NORM.format(name=name, imports=imports, factor="FACTOR"))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module(name)
    model = build(FlexBertConfig.from_dict({**SMALL, **IDS, "norm": name}), seed=1)
    to_hf(model, tokenizer_of(96), tmp_path / "export")  # which compares the logits, where the package is not
    assert (tmp_path / "export" / name / "helper.py").is_file()
