"""Dropout keyed by (seed, row, token, site), not drawn from a global generator.   T packed tokens, D channels.

A token's mask is then the same however the batch is split, on any rank and on any device, and when a block runs again.
It is arithmetic on whole tensors and no torch.Generator for each row: those would be launched row by row, and what they
draw differs between devices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbert.init import parameter_seed

# SplitMix64 (Steele et al., OOPSLA 2014): the increment of its state and the two factors of its output, as int64.
_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class TokenKeys:
    """The keys of a packed batch's tokens. Nothing is computed before a mask is drawn."""

    def __init__(
        self, seed: int, first_row: int, row_bounds: Tensor, num_tokens: int, wanted: Tensor | None = None
    ) -> None:
        """seed: 63 bits, of the step. first_row: place of the first row in the global batch. row_bounds: (rows + 1,)
        int32 on the tokens' device, starts of the rows, then T. num_tokens: T, known to the caller without a sync.
        wanted: (M,) int64, tokens that masks may be of, instead of all."""
        self.seed, self.first_row, self.row_bounds, self.num_tokens = seed, first_row, row_bounds, num_tokens
        self.wanted = wanted
        self.channel_numbers: dict[int, Tensor] = {}

    @cached_property
    def _tokens(self) -> Tensor:
        """(T,) int64: a function of the seed, the token's row and its place there."""
        bounds = self.row_bounds.long()
        rows = torch.arange(len(bounds) - 1, device=bounds.device)
        rows = rows.repeat_interleave(bounds.diff(), output_size=self.num_tokens)
        places = torch.arange(self.num_tokens, device=bounds.device) - bounds.index_select(0, rows)
        keys = _mix(_mix((rows + self.first_row) * _GOLDEN + self.seed) + places * _GOLDEN)
        return keys if self.wanted is None else keys.index_select(0, self.wanted)

    def of(self, wanted: Tensor) -> "TokenKeys":
        """The same, of some tokens."""
        return TokenKeys(self.seed, self.first_row, self.row_bounds, self.num_tokens, wanted)

    def kept(self, site: int, channels: int, probability: float) -> Tensor:
        """(T, channels) bool, or (M, channels), each False with the given probability; another draw for each site (63
        bits).

        Channel c of a token is (a + m c')^2 + b in 32 bits, with a, b and an odd m from the token's key and the site,
        and c' from c: multiply-add makes channels pairwise independent (Dietzfelbinger, STACS 1996), the square breaks
        linear relations among more of them as in Squares (arXiv 2004.06278), b makes the probability exact.
        """
        if channels not in self.channel_numbers:
            numbers = torch.arange(channels, device=self.row_bounds.device)
            self.channel_numbers[channels] = _halves(_mix(numbers * _GOLDEN))[0]
        state = self._tokens + site
        a, b = _halves(_mix(state))
        m, _ = _halves(_mix(state + _GOLDEN))
        drawn = torch.addcmul(a[:, None], m[:, None] | 1, self.channel_numbers[channels])
        torch.addcmul(b[:, None], drawn, drawn, out=drawn)
        return drawn >= min(round(probability * 2**32), 2**32 - 1) - 2**31

    def uniform(self, site: int) -> Tensor:
        """(T,) float64 in [0, 1), or (M,), one number for each token; another for each site (63 bits)."""
        return ((_mix(self._tokens + site) >> 11) & (2**53 - 1)).double() * 2.0**-53


_CURRENT: ContextVar[TokenKeys | None] = ContextVar("keys of dropout", default=None)


@contextmanager
def keyed_dropout(keys: TokenKeys | None) -> Iterator[None]:
    """Within, each `Dropout` draws by these keys; None: from torch's global generator, as without."""
    token = _CURRENT.set(keys)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_keys() -> TokenKeys | None:
    """Those of the `keyed_dropout` that is open, for other draws of its tokens."""
    return _CURRENT.get()


@contextmanager
def dropout_of(wanted: Tensor) -> Iterator[None]:
    """Within, what is dropped has a line for each of these tokens, (M,) int64, and not for all."""
    keys = _CURRENT.get()
    with keyed_dropout(None if keys is None else keys.of(wanted)):
        yield


def with_same_masks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the keys of now whenever it runs: in backward, on autograd's thread, the context is closed."""
    keys = _CURRENT.get()

    def run(*arguments: Any) -> Any:
        with keyed_dropout(keys):
            return function(*arguments)

    return run


class Dropout(nn.Module):
    """Zeroes elements in training and scales up the rest (arXiv 1207.0580). Costs nothing when it is off.

    Drawn by the keys of `keyed_dropout` when it runs in one, else from torch's global generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.site: int | None = None  # set by name_sites

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D). Within `keyed_dropout` it raises ValueError for another number of tokens than the keys
        have."""
        if not self.training or self.probability == 0:
            return hidden_states
        kept = self._kept(hidden_states)
        if kept is None:
            return F.dropout(hidden_states, self.probability)
        return hidden_states * kept * (1 / (1 - self.probability))

    # Compiled code would hold each site as a constant, and so be compiled for every layer anew.
    @torch.compiler.disable
    def _kept(self, hidden_states: Tensor) -> Tensor | None:
        keys = _CURRENT.get()
        if keys is None:
            return None
        assert self.site is not None, "name_sites was not called"
        tokens, channels = hidden_states.shape
        expected = keys.num_tokens if keys.wanted is None else len(keys.wanted)
        if tokens != expected:
            raise ValueError(f"keyed dropout: expected one line for each of {expected} tokens, got {tokens}")
        return keys.kept(self.site, channels, self.probability)


def name_sites(model: nn.Module) -> None:
    """Give each `Dropout` a number that follows from its path in the model."""
    for path, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = parameter_seed(0, path)


def _mix(state: Tensor) -> Tensor:
    """The next 64 random bits of SplitMix64 in these states, int64; sums and products wrap around."""
    z = state + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, not copies of the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 -> two (N,) int32."""
    first, second = z.view(torch.int32).view(-1, 2).unbind(1)
    return first, second
