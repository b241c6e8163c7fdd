"""Entities of tagged words, and scores of them, as CoNLL's conlleval and seqeval's default mode define them.

Tags are `O`, or a letter and a type: `B-PER`, `I-PER`, and of BIOES also `E-PER` and `S-PER` (a single word). One rule
reads IOB1, IOB2 and BIOES: an entity begins at B or S, at any tag that follows O, another type or an end (E, S), and
ends before the next of these. So a prediction that breaks its scheme (I after O) still holds entities.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Entity = tuple[str, int, int]
"""Type, number of its first word, number behind its last one."""


def entities(tags: Sequence[str]) -> list[Entity]:
    """Of one sentence, in order."""
    found: list[Entity] = []
    before, kind, first = "O", "", 0
    for number, tag in enumerate([*tags, "O"]):
        letter, _, name = tag.partition("-")
        name = name or "_"  # a bare `B` or `I`, as seqeval takes it
        begins = letter != "O" and (letter in "BS" or before in "OES" or name != kind)
        if before != "O" and (begins or letter == "O"):
            found.append((kind, first, number))
        if begins:
            first = number
        before, kind = letter, name
    return found


def entity_scores(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """precision, recall and f1 over all entities (micro), 0 where there is nothing to divide by, and `types`: the same
    with `support` for each type. An entity is right if type and both bounds are."""
    right: Counter[str] = Counter()
    of_expected: Counter[str] = Counter()
    of_predicted: Counter[str] = Counter()
    for theirs, ours in zip(expected, predicted, strict=True):
        if len(theirs) != len(ours):
            raise ValueError(f"{len(ours)} tags predicted for a sentence of {len(theirs)}")
        true, found = set(entities(theirs)), set(entities(ours))
        of_expected.update(kind for kind, _, _ in true)
        of_predicted.update(kind for kind, _, _ in found)
        right.update(kind for kind, _, _ in true & found)
    types = {
        kind: {**_scores(right[kind], of_expected[kind], of_predicted[kind]), "support": of_expected[kind]}
        for kind in sorted(of_expected | of_predicted)
    }
    return {**_scores(right.total(), of_expected.total(), of_predicted.total()), "types": types}


def _scores(right: int, expected: int, predicted: int) -> dict[str, float]:
    precision, recall = right / predicted if predicted else 0.0, right / expected if expected else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
