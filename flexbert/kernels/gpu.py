"""Attention kernels for CUDA: FlashAttention 2 and 3, torch's own, FlexAttention.

T tokens, N heads, K key heads, H head dim.

What each is given is checked on the CPU, against functions of the libraries' own signatures (flash) or by running the
same call uncompiled (flex). None makes the host wait for the device.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from flexbert.kernels import packed_flash
from flexbert.kernels.plan import AttentionPlan

Window = tuple[int, int]

# Of FlexAttention: its kernels' own tile.
_FLEX_BLOCK = 128


# Over 192, flash-attn 3's deterministic backward raises (its hopper/flash_api.cpp).
_LARGEST_HEAD = {"flash2": 256, "flash3": 192, "torch_flash": 256}
_CAPABILITY = {"flash2": ((8, 0), "A100"), "flash3": ((9, 0), "H100"), "torch_flash": ((8, 0), "A100")}


class _Wanted:
    deterministic = True


def set_deterministic(deterministic: bool) -> None:
    """Whether backward adds up in one order from now on, so that a step repeats its bits; it does unless told."""
    _Wanted.deterministic = deterministic


def is_deterministic() -> bool:
    """Whether it does."""
    return _Wanted.deterministic


def why_not(backend: str, device: str, dtype: torch.dtype | None, head_dim: int | None = None) -> str:
    """Why a CUDA kernel cannot run for a device type, dtype and head size (None: not known yet); empty when it can."""
    package, name, fix = _PACKAGES[backend]
    if device != "cuda":
        return f"{name} needs a CUDA device, not {device}"
    if backend == "torch_flash":
        if reason := packed_flash.why_not():
            return reason
    elif not installed(package):
        return f"the package {package} is not installed ({fix})"
    if backend == "flex":
        return ""
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"{name} computes in bfloat16 or float16, not {dtype}"
    if head_dim is not None and head_dim > _LARGEST_HEAD[backend]:
        return f"{name} has heads of at most {_LARGEST_HEAD[backend]}, not {head_dim}"
    if head_dim is not None and backend != "flash2" and head_dim % 8:  # flash-attn 2 pads them itself
        return f"{name} has heads of multiples of 8, not {head_dim}"
    lowest, example = _CAPABILITY[backend]
    if (capability := torch.cuda.get_device_capability()) < lowest:
        lowest_name, own_name = (".".join(map(str, version)) for version in (lowest, capability))
        return f"{name} needs compute capability {lowest_name} ({example}), not {own_name}"
    if backend == "flash3":
        if capability[0] != 9:
            return f"{name} has code for compute capability 9.0 (H100) only, not {'.'.join(map(str, capability))}"
        if is_deterministic() and not flash3_repeats():
            return (
                f"{name} adds up in another order each time (tried here), and the run is to repeat its bits: build one "
                "of 2025-09-17 or later, or set trainer.deterministic=false"
            )
    return ""


@functools.cache
def flash3_repeats(device: str = "cuda", tries: int = 5) -> bool:
    """Whether flash-attn 3's backward gives the same bits again when asked to: versions up to 2.8.3 do not look at what
    they are asked (hopper/flash_bwd_launch_template.h). Tried on one long document, where most sums meet.

    Whoever asks first may do so without gradients, in autocast, or within a block that is computed again in backward,
    which keeps other tensors than autograd saves: the trial has gradients of its own, and saves what it needs itself.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(torch.device(device).type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        return _repeats(device, tries)


def _repeats(device: str, tries: int) -> bool:
    tokens = 4096
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(tokens, 4, 64, generator=generator).to(device, torch.bfloat16) for _ in range(4)]
    inputs, weights = [each.requires_grad_() for each in given[:3]], given[3]
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    first: Any = None
    for _ in range(tries):
        out = flash3(*inputs, AttentionPlan(bounds, tokens, tokens), (-1, -1), None, 0.0)  # pyright: ignore
        found = torch.autograd.grad((out * weights).sum(), inputs)
        first = first or found
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, first, strict=True)):
            return False
    return True


_PACKAGES = {
    "flash3": ("flash_attn_interface", "flash-attn 3", "build the folder hopper/ of flash-attention"),
    "flash2": ("flash_attn", "flash-attn", "pip install -r requirements-gpu.txt"),
    "torch_flash": ("torch", "torch's packed flash attention", "it comes with torch"),
    "flex": ("triton", "FlexAttention's kernel", "it comes with torch on Linux"),
}


@functools.cache
def installed(package: str) -> bool:
    """Whether the package can be imported; it is not imported here."""
    return importlib.util.find_spec(package) is not None


def flash2(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: Window, slopes: Tensor | None, dropout_p: float
) -> Tensor:
    """FlashAttention-2 (arXiv 2307.08691), variable-length call: no padding. Its backward adds up in one order
    where that is asked for (set_deterministic), that a resumed run is the run."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_k=plan.max_seqlen,
        dropout_p=dropout_p,
        causal=False,
        window_size=window,
        alibi_slopes=slopes,
        deterministic=is_deterministic(),
    )


def flash3(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: Window, slopes: Tensor | None, dropout_p: float
) -> Tensor:
    """FlashAttention-3 (arXiv 2407.08608), for Hopper; without ALiBi and dropout, which it does not have. Backward: as
    flash2."""
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    assert slopes is None
    assert not dropout_p
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_k=plan.max_seqlen,
        causal=False,
        window_size=window,
        deterministic=is_deterministic(),
    )
    return out[0] if isinstance(out, tuple) else out  # its first versions return the log-sum-exp too


def torch_flash(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: Window, slopes: Tensor | None, dropout_p: float
) -> Tensor:
    """FlashAttention-2 as torch brings it (packed_flash.py); without ALiBi and dropout. Backward: as flash2."""
    assert slopes is None
    assert not dropout_p
    return packed_flash.attend(q, k, v, plan.cu_seqlens, plan.longest, window, is_deterministic())


def flex(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: Window, slopes: Tensor | None, dropout_p: float
) -> Tensor:
    """FlexAttention (arXiv 2412.05496): one kernel, generated by torch, for any window and ALiBi; no dropout."""
    from torch.nn.attention.flex_attention import flex_attention

    assert not dropout_p

    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[head] * (query - key).abs()

    call: Any = _compiled_flex() if q.is_cuda else flex_attention
    tables = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = call(
        *tables,
        score_mod=None if slopes is None else bias,
        block_mask=_flex_mask(plan, window),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_mask(plan: AttentionPlan, window: Window) -> Any:
    """Which tiles of keys each tile of queries needs: since sequences lie end to end, a range from the first key that
    its first query sees to the last that its last query sees. Never (T, T)."""
    from torch.nn.attention.flex_attention import BlockMask

    if window in plan.flex_masks:
        return plan.flex_masks[window]
    ids, total = plan.sequence_ids, plan.num_tokens
    left, right = (total if side < 0 else side for side in window)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[query] == ids[key]) & (query - key <= left) & (key - query <= right)

    firsts = torch.arange(0, total, _FLEX_BLOCK, device=ids.device)
    lasts = (firsts + _FLEX_BLOCK - 1).clamp_max(total - 1)
    bounds = plan.cu_seqlens.long()
    first_keys = torch.maximum(bounds[ids[firsts]], firsts - left)
    last_keys = torch.minimum(bounds[ids[lasts] + 1] - 1, lasts + right)
    first_tiles, last_tiles = first_keys // _FLEX_BLOCK, last_keys // _FLEX_BLOCK
    places = torch.arange(len(firsts), device=ids.device)
    # Entries past a line's count are not read; they only have to be tiles that exist, each once.
    tiles = (first_tiles[:, None] + places[None, :]) % len(firsts)
    mask = BlockMask.from_kv_blocks(
        (last_tiles - first_tiles + 1).int()[None, None],
        tiles.int()[None, None],
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(total, total),
    )
    plan.flex_masks[window] = mask
    return mask
