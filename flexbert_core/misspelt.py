"""What a name that is not valid may have meant."""

import difflib
from collections.abc import Iterable, Sequence

_MOST_NAMED = 5


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or all of them when none is near."""
    valid = sorted(valid)
    near = nearest(name, valid)
    return f"did you mean {near!r}?" if near is not None else f"valid names: {', '.join(valid)}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that a misspelt one means; None when none is near: `needle` is not meant by `speed`."""
    return next(iter(difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.6)), None)


def unknown_keys(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What is wrong with keys: a hint for each that is near a valid one; the valid ones once for all the others."""
    hints = {key: nearest(key, known) for key in unknown}
    faults = [f"unknown key {key!r}, did you mean {near!r}?" for key, near in hints.items() if near is not None]
    if far := [key for key in unknown if hints[key] is None]:
        named = ", ".join(map(repr, far[:_MOST_NAMED]))
        more = f" and {len(far) - _MOST_NAMED} more" if len(far) > _MOST_NAMED else ""
        faults.append(f"unknown key{'s' * (len(far) > 1)} {named}{more}, valid names: {', '.join(sorted(known))}")
    return "; ".join(faults)
