"""Tagging of words: columns read, the loss of tokens, and a model that learns names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

from data.keyed import keyed_generator
from evals.classifiers import Encoded
from evals.conll import TaggedSentences, read_conll
from evals.finetuning import Plan, Split, fine_tune
from evals.interface import Model
from evals.ner import _encoded  # pyright: ignore[reportPrivateUsage]
from evals.taggers import load_tagger
from flexbert_core.schema import ConfigError
from recipe.slots import OPTIMIZERS
from tests.helpers.texts import evaluation, text_tokenizer


def test_columns_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\n# text = a comment\nNew\tA\tB-NP\tI-LOC\r\nYork City\tB\tX\tI-LOC\n"
    )
    sentences = read_conll(tmp_path / "a.txt")
    assert sentences.words == [["EU", "rejects"], ["New", "York City"]]
    assert sentences.tags == [["I-ORG", "O"], ["I-LOC", "I-LOC"]]
    assert read_conll(tmp_path / "a.txt").digest == sentences.digest
    (tmp_path / "b.txt").write_text("O EU\nB-X York\n")
    assert read_conll(tmp_path / "b.txt", 1, 0).words == [["EU", "York"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("EU NNP\n", "a.txt:1: 'NNP' is no tag"),
        ("EU O\nYork\n", "a.txt:2: 'York' is no tag"),
        ("\n\n", "a.txt: holds no sentences"),
    ],
)
def test_bad_columns_are_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_conll(tmp_path / "a.txt")
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"no such file; there are: a\.txt"):
        read_conll(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_text("EU O\n")
    with pytest.raises(ConfigError, match="has 2 columns, so none of number 5"):
        read_conll(tmp_path / "c.txt", 0, 5)


def write(file: Path, count: int, seed: int) -> None:
    """Sentences in which places stand behind `in` or are `paris`; a tag of two words where both are given."""
    generator = keyed_generator(seed, "sentences")
    lines = []
    for _ in range(count):
        for word in generator.choice(["the", "cat", "dog", "sat", "on"], size=int(generator.integers(2, 6))):
            lines.append(f"{word} O")
        lines.append("in O")
        lines += ["paris B-LOC", "berlin I-LOC"] if generator.random() < 0.5 else ["berlin B-LOC"]
        lines += [". O", ""]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("runtime", [None, pytest.param("transformers", marks=pytest.mark.slow)])
def test_a_model_learns_names(runtime: str | None, model: Model, tmp_path: Path) -> None:
    write(tmp_path / "train.txt", 48, 1)
    write(tmp_path / "dev.txt", 20, 2)
    config = {"name": "ner", "data": str(tmp_path), "seeds": [0], "lr": 3e-3, "epochs": 3, "batch_size": 8}
    ner = evaluation(**config, runtime=runtime)
    results = {cell.name: ner.compute(cell, model, tmp_path) for cell in ner.cells(model, {})}
    assert results["seed0"]["runtime"] == (runtime or "flexbert")
    assert results["seed0"]["cut_sentences"] == 0
    scores = ner.scores(model, results)
    assert scores["f1"]["mean"] > 0.9
    assert set(scores) == {"f1", "precision", "recall"}


def test_words_that_are_cut_off_count_as_untagged(model: Model, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").write_text("the O\n" * 12 + "paris B-LOC\n")
    ner = evaluation(name="ner", data=str(tmp_path), seeds=[0], max_length=8, epochs=1)
    result = ner.compute(ner.cells(model, {})[0], model, tmp_path)
    assert (result["cut_sentences"], result["recall"]) == (1, 0.0)


def test_the_loss_of_a_batch_does_not_depend_on_microbatches(model: Model) -> None:
    """Sentences of different lengths weigh by their labelled tokens."""
    generator = keyed_generator(0, "labels")
    rows = [Encoded(generator.integers(5, 60, size).tolist(), None) for size in (3, 30, 7, 12)]
    labels = [[-100, *generator.integers(0, 3, len(row.input_ids) - 1).tolist()] for row in rows]
    found: list[Any] = []
    for tokens in (10_000, 20):
        tagger = load_tagger(model.folder, 3, 0, torch.device("cpu"))
        head: Any = tagger.model.head
        head.dropout = nn.Identity()
        plan = Plan(1e-3, 2, 4, 0, OPTIMIZERS.parse({"name": "adamw"}), 0.0, None, tokens, "fp32")
        result, weights = fine_tune(
            tagger, Split(rows, labels), lambda _: {"score": 0.0}, plan, "tokens", torch.device("cpu")
        )
        found.append((result["losses"], weights["head.classifier.weight"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_transformers_scores_come_without_padding(model: Model) -> None:
    tagger = load_tagger(model.folder, 3, 0, torch.device("cpu"), "transformers")
    rows = [Encoded([1, 7, 8, 2], None), Encoded([1, 9, 2], None)]
    tagger.eval()
    with torch.no_grad():
        both = tagger.logits(rows, None)
        alone = torch.cat([tagger.logits([row], None) for row in rows])
    assert both.shape == (7, 3)
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)


def test_train_data_without_entities_is_refused(model: Model, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").write_text("the O\n")
    with pytest.raises(ConfigError, match="every word is tagged O"):
        evaluation(name="ner", data=str(tmp_path))


def test_words_hold_blanks_other_than_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("10\u00a0000 CD O\nEU NNP B-ORG\n\u3000\n")
    assert read_conll(tmp_path / "a.txt").words == [["10\u00a0000", "EU"]]


WORDS = ["EU", "rejects", "German", "\u00a0", "call", "in", "Zürich", "."]


def byte_level(trim_offsets: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)  # pyright: ignore
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<pad>", "<s>", "</s>", "<mask>"], initial_alphabet=letters
    )
    backend.train_from_iterator(["EU rejects German call in Zürich ."] * 9, trainer)
    return backend


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, RobertaTokenizerFast])
def test_byte_level_tokens_are_those_of_the_text(kind: Any, trim_offsets: bool) -> None:
    """With the spaces between words, as models have learned them."""
    tokenizer = kind(tokenizer_object=byte_level(trim_offsets), add_prefix_space=False)
    tags = ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-LOC", "O"]
    split, cut = _encoded(tokenizer, TaggedSentences([WORDS], [tags], ""), ["O", "B-ORG", "B-MISC", "B-LOC"], 64)
    row: Any = split.rows[0]
    assert row.input_ids == tokenizer(" ".join(WORDS))["input_ids"]
    tokens = [tokenizer.convert_ids_to_tokens(row.input_ids[at]) for at, _ in row.first_tokens]
    assert [word for _, word in row.first_tokens] == list(range(8))
    assert all(
        token.startswith("Ġ") for token in [*tokens[1:3], *tokens[4:]]
    )  # the no-break space is tokens of its own
    assert split.labels is not None
    assert [split.labels[0][at] for at, _ in row.first_tokens] == [1, 0, 2, 0, 0, 0, 3, 0]
    assert cut == 0


def test_wordpiece_tokens_are_those_of_the_words() -> None:
    """A word without a token, such as a no-break space, is none's."""
    tokenizer, words = text_tokenizer(), [*WORDS, "cats", "sleeping"]
    for most in (64, 12):
        split, cut = _encoded(tokenizer, TaggedSentences([words], [["O"] * 10], ""), ["O"], most)
        theirs: Any = tokenizer([words], is_split_into_words=True, truncation=True, max_length=most)
        numbers = theirs.word_ids(0)
        firsts = [(numbers.index(word), word) for word in range(10) if word in numbers]
        row: Any = split.rows[0]
        assert (row.input_ids, row.first_tokens) == (theirs["input_ids"][0], firsts)
        assert 3 not in dict(firsts).values()
        assert cut == (most == 12)
