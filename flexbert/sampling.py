"""Text from a masked language model: the ancestral sampler of masked diffusion.   T packed tokens, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexbert.dropout import TokenKeys
from flexbert.init import parameter_seed
from flexbert.losses import sample_tokens
from flexbert.model import FlexBertForMaskedLM
from flexbert_core.schema import RunError

_WHEN, _WHAT = parameter_seed(0, "step of a token"), parameter_seed(0, "token of a place")


@torch.no_grad()
def generate(
    model: FlexBertForMaskedLM,
    rows: Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    never: Sequence[int],
    steps: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """The rows with their masked tokens filled in, in so many steps; other tokens stay as they are.

    rows: token ids with [CLS] and [SEP], each a document of its own; may be empty. never: ids that are not drawn.
    steps: 1 to 2 ** 53. temperature: over 0, of the softmax; at infinity all tokens are alike. top_p: in (0, 1]; draws
    from the fewest tokens that have so much of the probability together (arXiv 1904.09751). What is drawn in a row is a
    function of the seed, its number and its masks, to rounding. The model is in evaluation mode meanwhile.

    MDLM's sampler (arXiv 2406.07524, section 3): time goes from 1 to 0 in equal steps, and a token that is masked at t
    is drawn from the model's softmax on the way to s with chance (t - s) / t, by itself. So each token is drawn in one
    of the steps, all alike: that is drawn ahead, the model runs in steps that draw something, and the last block and
    the head for those tokens only.

    Raises ValueError for arguments out of their range, RunError for a model whose states are not finite.
    """
    if not (1 <= steps <= 2**53 and temperature > 0 and 0 < top_p <= 1):
        raise ValueError(
            f"expected steps from 1 to 2 ** 53, a temperature over 0 and a top_p over 0, up to 1, got {steps}, "
            f"{temperature} and {top_p}"
        )
    device = model.encoder.token_table.device
    lengths = [len(row) for row in rows]
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=device)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    keys = TokenKeys(parameter_seed(seed, "generate"), 0, bounds, len(ids))
    chance = keys.uniform(_WHAT)
    due = torch.where(ids == mask_token_id, (keys.uniform(_WHEN) * steps).long(), -1)
    weight, bias = model.head.decoder(model.encoder.token_table)
    barred = torch.tensor(list(never), dtype=torch.int64, device=device)

    def adjust(logits: Tensor) -> Tensor:
        return _nucleus((logits / temperature).index_fill(1, barred, -torch.inf), top_p)

    was_training = model.training
    model.eval()
    try:
        for step in due[due >= 0].unique().tolist():
            index = (due == step).nonzero().squeeze(1)
            states = model.head(model.encoder(ids, bounds, max(lengths), wanted=index))
            if not states.isfinite().all():
                raise RunError("the model's states are not finite: its weights are damaged, and nothing can be drawn")
            ids[index] = sample_tokens(states, weight, bias, chance[index], adjust)
    finally:
        model.train(was_training)
    return [part.tolist() for part in ids.split(lengths)]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits (m, V) without those behind the fewest whose probabilities add up to top_p."""
    if top_p == 1:
        return logits
    probs, order = torch.sort(logits.softmax(1), dim=1, descending=True, stable=True)
    behind = probs.cumsum(1) - probs >= top_p
    return logits.masked_fill(torch.zeros_like(behind).scatter(1, order, behind), -torch.inf)
