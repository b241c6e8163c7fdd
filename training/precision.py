"""In which precision a run computes: `trainer.precision`, and what it means for products of float32."""

import torch


def computes_in_bf16(precision: str) -> bool:
    """Whether forward and backward run under autocast to bfloat16 in this process."""
    return torch.cuda.is_available() if precision == "auto" else precision == "amp_bf16"


def multiply_in_float32() -> None:
    """Give products of float32 all its bits from now on. On GPUs Composer sets TF32, whose products keep 10 bits of the
    mantissa: whenever it makes its device, which its process group and its Trainer both do. To be called after both."""
    torch.set_float32_matmul_precision("highest")
