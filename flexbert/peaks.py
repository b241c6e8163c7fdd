"""What devices can do at best: the denominator of MFU."""

import re

# Dense products of bfloat16 with float32 sums, in FLOP/s, by words of torch.cuda.get_device_name; the first that fits.
# Makers print twice as much "with sparsity". All are NVIDIA's data sheets or architecture white papers:
_PEAKS = (
    ("B200", 2250e12),  # HGX B200 data sheet: 36 PFLOPS sparse for 8
    ("H200 NVL", 835.5e12),  # H200 data sheet: 1,671 TFLOPS sparse
    ("H200", 989.5e12),  # H200 data sheet, SXM: 1,979 sparse
    ("GH200", 989.5e12),  # GH200 data sheet: 990
    ("H100 NVL", 835.5e12),  # H100 data sheet: 1,671 sparse
    ("H100 PCIe", 756e12),  # H100 data sheet: 1,513 sparse
    ("H100", 989.5e12),  # H100 data sheet, SXM: 1,979 sparse
    ("H800 PCIe", 756e12),  # as H100
    ("H800", 989.5e12),
    ("H20", 148e12),  # H20 data sheet
    ("A100", 312e12),  # A100 data sheet, SXM and PCIe
    ("A800", 312e12),  # as A100
    ("A30", 165e12),  # A30 data sheet
    ("A40", 149.7e12),  # A40 data sheet
    ("RTX A6000", 154.8e12),  # RTX A6000 data sheet: 309.7 sparse
    ("A10G", 70e12),  # A10G data sheet: 140 sparse
    ("A10", 125e12),  # A10 data sheet
    ("L40S", 362e12),  # L40S data sheet: 733 sparse
    ("L40", 181e12),  # L40 data sheet
    ("L4", 121e12),  # L4 data sheet: 242 sparse
    ("RTX 6000 Ada", 364.2e12),  # Ada white paper
    ("RTX 4090", 165.2e12),  # Ada white paper, appendix A: float32 sums
    ("RTX 3090", 71e12),  # GA102 white paper, appendix A: float32 sums
)


def peak_flops(device_name: str) -> float | None:
    """Of one device, by the name that torch gives it; None for one that is not in the table."""
    return next((peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device_name)), None)
