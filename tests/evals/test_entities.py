"""Entities as seqeval's documentation has them, and against conlleval's own way: counting at the borders of chunks."""

from typing import Any

import pytest

from data.keyed import keyed_generator
from evals.entities import entities, entity_scores

# From seqeval's README and docstrings.
TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
FOUND = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_the_example_of_seqeval() -> None:
    scores = entity_scores(TRUE, FOUND)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.5, 0.5, 0.5)
    assert scores["types"] == {
        "MISC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
        "PER": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1},
    }


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # seqeval.get_entities: (PER, 0, 1), (LOC, 3, 3)
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),  # IOB1: B where one entity follows another
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("S-PER B-LOC I-LOC E-LOC S-PER", [("PER", 0, 1), ("LOC", 1, 4), ("PER", 4, 5)]),
        ("B-LOC E-LOC I-LOC", [("LOC", 0, 2), ("LOC", 2, 3)]),
        ("B-PER-x I-PER-x", [("PER-x", 0, 2)]),
        ("B I O I", [("_", 0, 2), ("_", 3, 4)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_of_every_scheme(tags: str, expected: list[Any]) -> None:
    assert entities(tags.split()) == expected


def test_nothing_to_find_or_found_scores_zero() -> None:
    nothing = [["O", "O"]]
    assert entity_scores(nothing, nothing) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "types": {}}
    assert entity_scores([["B-A", "O"]], nothing)["f1"] == entity_scores(nothing, [["B-A", "O"]])["f1"] == 0.0
    with pytest.raises(ValueError, match="2 tags predicted for a sentence of 1"):
        entity_scores([["O"]], nothing)


ENDS = {"BB", "BS", "BO", "IB", "IS", "IO", "EB", "EI", "EO", "EE", "ES", "SB", "SI", "SO", "SE", "SS"}
STARTS = {"BB", "IB", "OB", "EB", "SB", "BS", "IS", "OS", "ES", "SS", "EE", "EI", "SE", "SI", "OE", "OI"}


def conlleval(expected: list[str], predicted: list[str]) -> tuple[int, int, int]:
    """Right, expected and predicted chunks by conlleval.pl's loop: no chunk is ever put together, a flag says whether
    one that began in both at once still runs in both."""
    right = num_expected = num_predicted = 0
    both = False
    last = [("O", ""), ("O", "")]
    for theirs, ours in zip([*expected, "O"], [*predicted, "O"], strict=True):
        now = [(tag[0], tag[2:]) for tag in (theirs, ours)]
        ends = [
            before[0] + tag[0] in ENDS or (before[0] != "O" and before[1] != tag[1])
            for before, tag in zip(last, now, strict=True)
        ]
        starts = [
            before[0] + tag[0] in STARTS or (tag[0] != "O" and before[1] != tag[1])
            for before, tag in zip(last, now, strict=True)
        ]
        if both:
            if ends[0] and ends[1] and last[0][1] == last[1][1]:
                both, right = False, right + 1
            elif ends[0] != ends[1] or now[0][1] != now[1][1]:
                both = False
        if starts[0] and starts[1] and now[0][1] == now[1][1]:
            both = True
        num_expected += starts[0]
        num_predicted += starts[1]
        last = now
    return right, num_expected, num_predicted


@pytest.mark.parametrize("letters", ["BI", "BIES"])
def test_random_tags_score_as_by_conlleval(letters: str) -> None:
    """Well-formed or not: most of these break their scheme."""
    generator = keyed_generator(0, "random tags")
    choices = ["O", *(f"{letter}-{kind}" for letter in letters for kind in ("X", "Y"))]
    sums = [0, 0, 0]
    expected, predicted = [], []
    for _ in range(300):
        tags = generator.choice(choices, size=12).tolist()
        changed = [tag if generator.random() < 0.8 else str(generator.choice(choices)) for tag in tags]
        expected.append(tags)
        predicted.append(changed)
        sums = [one + other for one, other in zip(sums, conlleval(tags, changed), strict=True)]
    right, num_expected, num_predicted = sums
    scores = entity_scores(expected, predicted)
    assert right > 500
    assert scores["precision"] == pytest.approx(right / num_predicted)
    assert scores["recall"] == pytest.approx(right / num_expected)
    assert scores["f1"] == pytest.approx(2 * right / (num_expected + num_predicted))
