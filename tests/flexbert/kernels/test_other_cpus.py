"""The numbers hold on older CPUs too: this machine stands in for one without AVX-512, and so without bfloat16
products. The other way round nothing can: a CPU that lacks them cannot stand in for one that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent.parent
OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.slow  # another pytest
def test_products_on_a_cpu_without_avx512() -> None:
    question = "import torch; from flexbert.kernels.cpu import lacks; print(lacks(torch.bfloat16, 'cpu'))"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/flexbert/kernels/test_products.py"]
    said = []
    for each in (["-c", question], arguments):
        done = subprocess.run(
            [sys.executable, *each], cwd=ROOT, env={**os.environ, **OLDER}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    if torch.backends.mkldnn.is_available():
        assert said[0].split() == ["True"]
    assert " passed" in said[1]
