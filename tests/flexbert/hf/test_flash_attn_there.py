"""Exports on machines where flash-attn is installed, which transformers takes by itself: not for their check."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, environment

# flash-attn as transformers sees it on a GPU machine; a call of it fails, as it does for tensors on the CPU.
STUB = """
def _on_the_cpu(*_, **__):
    raise RuntimeError("FlashAttention only supports CUDA tensors")
flash_attn_func = flash_attn_varlen_func = flash_attn_varlen_qkvpacked_func = _on_the_cpu
"""
SCRIPT = """
import sys
import transformers.modeling_flash_attention_utils
import transformers.modeling_utils
import transformers.utils
import transformers.utils.import_utils
modules = [transformers.utils.import_utils, transformers.utils, transformers.modeling_utils]
for module in [*modules, transformers.modeling_flash_attention_utils]:
    module.is_flash_attn_2_available = lambda: True  # it asks for a CUDA device besides
from flexbert import build, to_hf
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tokenizer_of
to_hf(build(tiny()), tokenizer_of(97), sys.argv[1])
print(transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1]).config._attn_implementation)
"""


def stub(folder: Path) -> Path:
    """A folder for PYTHONPATH: the package with its metadata, without a kernel."""
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(f"__version__ = '2.8.3'\n{STUB}")
    (folder / "flash_attn" / "bert_padding.py").write_text(
        STUB + "index_first_axis = pad_input = unpad_input = _on_the_cpu\n"
    )
    (folder / "flash_attn" / "flash_attn_interface.py").write_text(STUB)
    (folder / "flash_attn" / "layers").mkdir()
    (folder / "flash_attn" / "layers" / "__init__.py").write_text("")
    (folder / "flash_attn" / "layers" / "rotary.py").write_text(
        "import torch\n"
        + STUB
        + "class RotaryEmbedding(torch.nn.Module):\n    def __init__(self, **_):\n        super().__init__()\n"
    )
    (folder / "flash_attn" / "ops" / "triton").mkdir(parents=True)
    (folder / "flash_attn" / "ops" / "__init__.py").write_text("")
    (folder / "flash_attn" / "ops" / "triton" / "__init__.py").write_text("")
    (folder / "flash_attn" / "ops" / "triton" / "rotary.py").write_text(STUB + "apply_rotary = _on_the_cpu\n")
    info = folder / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "RECORD").write_text("")
    return folder


@pytest.mark.slow
def test_an_export_is_checked_where_flash_attn_is_installed(tmp_path: Path) -> None:
    """transformers' ModernBERT takes flash-attn there, on the CPU too: the check says which kernel it wants."""
    folder = stub(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "export")], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment() | {"PYTHONPATH": str(folder)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "flash_attention_2"
    assert (tmp_path / "export" / "parity.json").is_file()
