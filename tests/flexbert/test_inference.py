"""What runs another way without gradients gives the same as with them."""

import pytest
import torch

from flexbert import FlexBertConfig, build
from flexbert.kernels import AttentionPlan, attend
from tests.flexbert.kernels.cases import LENGTHS, TOLERANCE, detached, qkv_of
from tests.helpers.models import ODD_LENGTHS, batch_of, tiny


@pytest.mark.parametrize("window", [(1, 1), (7, 7), (31, 31), (33, 33), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_equal_eager(lengths: tuple[int, ...], window: tuple[int, int]) -> None:
    tensors = detached(qkv_of(sum(lengths)))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
    ours, expected = (attend(*tensors, plan, window_size=window, backend=backend) for backend in ("tiled", "eager"))
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["modernbert-tiny", "tiny"])
def test_whole_models(name: str) -> None:
    config = tiny() if name == "tiny" else FlexBertConfig.from_yaml(name)
    model = build(config).eval()
    ids, cu_seqlens, max_seqlen, _ = batch_of(ODD_LENGTHS)
    expected = model(ids, cu_seqlens, max_seqlen).logits
    assert expected is not None
    with torch.inference_mode():
        logits = model(ids, cu_seqlens, max_seqlen).logits
    torch.testing.assert_close(logits, expected.detach(), atol=2e-5, rtol=1e-5)
