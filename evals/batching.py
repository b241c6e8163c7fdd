"""Which rows go together, so that memory is bounded and little of a padded batch is padding."""

from collections.abc import Iterator, Sequence


def parts(lengths: Sequence[int], order: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """The rows of `order` in their order, as many at once as a padded batch of `most_tokens` slots has room for, at
    least one. lengths: of each row, in tokens."""
    part: list[int] = []
    widest = 0
    for row in order:
        if part and max(widest, lengths[row]) * (len(part) + 1) > most_tokens:
            yield part
            part, widest = [], 0
        part.append(row)
        widest = max(widest, lengths[row])
    if part:
        yield part


def by_length(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """All rows, those of like length together."""
    return parts(lengths, sorted(range(len(lengths)), key=lengths.__getitem__), most_tokens)
