"""Filters of prepare: what each keeps, what is counted, near-duplicates, and a filter from outside the package."""

import json
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from data.keyed import keyed_generator
from data.preparation import duplicates
from data.preparation.choice import choose_documents
from data.preparation.dataset import load_prepare_config
from data.preparation.documents import numbered, save_arrays
from data.preparation.filters import FILTERS, DocumentFilter, StreamFilter
from data.preparation.filters.minhash import Words
from data.store.shards import open_stream
from flexbert_core.schema import Component, ConfigError, RunError
from tests.helpers.preparing import config_file, documents, files, read_texts, run


@FILTERS.register("test_every_nth")
class EveryNth(DocumentFilter):
    """A filter that somebody else wrote: keeps documents whose number is a multiple of n."""

    columns = ("number",)

    class Config(Component):
        name: Literal["test_every_nth"] = "test_every_nth"
        n: int = 2

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        return columns["number"] % self.config.n == 0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


LANGUAGES = ["en", "de", None, "fr"]


def rows(count: int = 80) -> list[dict[str, Any]]:
    return [
        {"text": text, "number": number, "lang": LANGUAGES[number % 4], "score": number / count}
        for number, text in enumerate(documents(count))
    ]


def config_with(folder: Path, filters: list[Any], source: dict[str, Any] | None = None, **changes: Any) -> Path:
    """One stream, `a`, with these filters."""
    node: dict[str, Any] = {"source": source or {"name": "jsonl", "paths": [str(folder / "a")]}, "filters": filters}
    return config_file(folder, streams={"a": node}, **{"validation_fraction": 0, **changes})


def kept(folder: Path, filters: list[Any], **changes: Any) -> tuple[list[str], dict[str, int]]:
    """Texts of the training split, and the counts of what the filters dropped."""
    output = run(config_with(folder, filters, **changes))
    return read_texts(output / "a" / "train"), open_stream(output / "a" / "train").manifest.filtered


FILTER_CASES: list[tuple[dict[str, Any], Any]] = [
    ({"name": "length", "min_characters": 500}, lambda row: len(row["text"]) >= 500),
    ({"name": "length", "max_characters": 700}, lambda row: len(row["text"]) <= 700),
    ({"name": "language", "keep": ["de", "fr"], "column": "lang"}, lambda row: row["lang"] in ("de", "fr")),
    (
        {"name": "language", "keep": ["en"], "column": "lang", "score_column": "score", "min_score": 0.25},
        lambda row: row["lang"] == "en" and row["score"] >= 0.25,
    ),
    ({"name": "regex", "drop": r"^\d*[02468] "}, lambda row: row["number"] % 2),
    ({"name": "regex", "keep": r"^\d*[02468] "}, lambda row: row["number"] % 2 == 0),
    ({"name": "test_every_nth", "n": 3}, lambda row: row["number"] % 3 == 0),
]


@pytest.mark.parametrize(("node", "wanted"), FILTER_CASES)
def test_filter_keeps_what_it_should(tmp_path: Path, node: dict[str, Any], wanted: Any) -> None:
    write_rows(tmp_path / "a" / "1.jsonl", rows())
    expected = [row["text"] for row in rows() if wanted(row)]
    assert 0 < len(expected) < 80
    assert kept(tmp_path, [node]) == (expected, {node["name"]: 80 - len(expected)})


def test_every_filter_has_a_case() -> None:
    assert {node["name"] for node, _ in FILTER_CASES} | {"minhash", "test_every_third"} == set(FILTERS.entries)


@pytest.mark.slow
def test_parquet_columns_and_filter_from_outside_in_worker_processes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a").mkdir()
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "a" / "1.parquet", row_group_size=5)
    source = {"name": "parquet", "paths": [str(tmp_path / "a")]}
    filters = [{"name": "test_every_nth", "n": 2}, {"name": "language", "keep": ["en"], "column": "lang"}]
    path = config_with(tmp_path, filters, source)
    output = run(path, workers=2)
    texts = [row["text"] for row in rows() if row["number"] % 4 == 0]
    assert read_texts(output / "a" / "train") == texts
    assert files(run(path, f"output={tmp_path / 'one'}")) == files(output)


def test_dropped_documents_are_counted_once_by_the_first_that_drops_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [*rows(), {**rows()[0]}, {**rows()[1]}]
    write_rows(tmp_path / "a" / "1.jsonl", copies)
    filters = [
        {"name": "regex", "drop": "^[0-4] "},
        {"name": "length", "min_characters": 300},
        {"name": "regex", "drop": "^[0-9] "},
    ]
    output = run(config_with(tmp_path, filters, validation_fraction=0.2))
    short = [row for row in rows() if row["number"] > 4 and len(row["text"]) < 300]
    last = [row for row in rows() if 5 <= row["number"] <= 9 and len(row["text"]) >= 300]
    total: dict[str, int] = {}
    for split in ("train", "validation"):
        manifest = open_stream(output / "a" / split).manifest
        assert manifest.duplicate_documents == 0  # copies of what is filtered: filtered themselves
        for name, count in manifest.filtered.items():
            total[name] = total.get(name, 0) + count
    assert total == {"regex": 7, "length": len(short), "regex-2": len(last)}
    assert "dropped: 0 duplicates, " in capsys.readouterr().err


def planted(seed: int, share: float) -> tuple[str, str]:
    """A text of 400 random words, and one in which that share of the words is replaced."""
    rng = keyed_generator(seed, "planted")
    words = np.array([f"w{number}x" for number in rng.integers(0, 5000, 400)])
    words = np.array(["".join(chr(97 + int(digit)) for digit in word[1:-1]) for word in words])
    other = words.copy()
    places = rng.choice(400, int(400 * share), replace=False)
    other[places] = [
        "zz" + "".join(chr(97 + int(digit)) for digit in str(n)) for n in rng.integers(0, 5000, len(places))
    ]
    return " ".join(words), " ".join(other)


def jaccard(first: str, second: str, n: int = 5) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[start:] for start in range(n)), strict=False))

    return len(grams(first) & grams(second)) / len(grams(first) | grams(second))


def test_minhash_finds_near_duplicates_as_often_as_the_formula_says(tmp_path: Path) -> None:
    """100 pairs at each of three similarities; per pair, found with p = 1 - (1 - s^8)^14, and unrelated ones never."""
    found: dict[float, tuple[int, list[float]]] = {}
    texts, pairs = [], []
    for place, share in enumerate((0.005, 0.06, 0.2)):
        for number in range(100):
            first, second = planted(1000 * place + number, share)
            pairs.append((share, jaccard(first, second), second))
            texts += [first, second]
    # first halves in one file, second halves in another: pairs lie in different tasks
    write_rows(tmp_path / "a" / "1.jsonl", [{"text": text} for text in texts[0::2]])
    write_rows(tmp_path / "a" / "2.jsonl", [{"text": text} for text in texts[1::2]])
    result, counts = kept(tmp_path, [{"name": "minhash"}])
    assert result[:300] == texts[0::2]  # the first of each pair stays, and nothing unrelated is dropped
    there = set(result)
    for share in (0.005, 0.06, 0.2):
        mine = [(similarity, second not in there) for each, similarity, second in pairs if each == share]
        found[share] = (sum(dropped for _, dropped in mine), [similarity for similarity, _ in mine])
    for dropped, similarities in found.values():
        probability = 1 - (1 - np.array(similarities) ** 8) ** 14
        mean, deviation = probability.sum(), np.sqrt((probability * (1 - probability)).sum())
        assert abs(dropped - mean) <= 4 * deviation + 1  # false alarm about 6e-5
    assert found[0.005][0] == 100
    assert found[0.2][0] < 30
    assert counts == {"minhash": sum(dropped for dropped, _ in found.values())}


def test_minhash_keeps_the_first_of_a_chain_and_ignores_case_digits_punctuation(tmp_path: Path) -> None:
    base, _ = planted(1, 0)
    unspaced = "".join(chr(0x4E00 + int(number)) for number in keyed_generator(2, "han").integers(0, 3000, 300))
    texts = [
        "short text",
        "Short text!",
        unspaced + "one",
        base,
        base.upper() + " 1 2",
        base.replace(" ", ", "),
        unspaced + "two",
    ]
    write_rows(tmp_path / "a" / "1.jsonl", [{"text": text} for text in texts])
    assert kept(tmp_path, [{"name": "minhash"}]) == (texts[:4], {"minhash": 3})


def test_minhash_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    for part in range(4):
        texts = [text for number in range(25 * part, 25 * part + 25) for text in planted(number, 0.02)]
        write_rows(tmp_path / "a" / f"{part}.jsonl", [{"text": text} for text in texts])
    path = config_with(
        tmp_path, [{"name": "length", "min_characters": 10}, {"name": "minhash"}], validation_fraction=0.1
    )
    one = run(path)
    assert files(run(path, f"output={tmp_path / 'two'}", workers=2)) == files(one)
    assert open_stream(one / "a" / "train").manifest.filtered["minhash"] > 50


def test_words() -> None:
    assert Words().word_tokenize("two words \u4f60\u597dab c") == ["two", "words", "\u4f60", "\u597d", "ab", "c"]


@pytest.mark.parametrize("partition", [3, 50, 10**6])
def test_partitions_do_not_show(tmp_path: Path, partition: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact copies and a budget over three streams, against a direct computation."""
    texts = documents(150)
    order = keyed_generator(5, "copies").integers(0, 150, (3, 120))
    streams = {}
    for name, numbers in zip("abc", order, strict=True):
        for part in range(3):
            write_rows(
                tmp_path / name / f"{part}.jsonl", [{"text": texts[n]} for n in numbers[40 * part : 40 * part + 40]]
            )
        streams[name] = {"source": {"name": "jsonl", "paths": [str(tmp_path / name)]}}
    monkeypatch.setattr(duplicates, "PARTITION_DOCUMENTS", partition)
    monkeypatch.setattr("data.preparation.choice.BINS", 7)
    output = run(
        config_file(tmp_path, streams={**streams, "a": {**streams["a"], "max_bytes": "30K"}}, validation_fraction=0)
    )
    seen: set[str] = set()
    for name, numbers in zip("abc", order, strict=True):
        fresh = list(dict.fromkeys(texts[n] for n in numbers if texts[n] not in seen))
        found = read_texts(output / name / "train")
        if name == "a":
            assert 27_000 < sum(len(text.encode()) for text in found) <= 30_000
            assert found == [text for text in fresh if text in set(found)]
        else:
            assert found == fresh
        seen |= set(found)  # what the budget left out of `a` is no copy in `b`


@FILTERS.register("test_every_third")
class EveryThird(StreamFilter):
    """Drops of each task every third document."""

    class Config(Component):
        name: Literal["test_every_third"] = "test_every_third"

    def drop(self, documents: Any, counts: Sequence[int], sizes: Any, folder: Path, run: Any) -> Iterator[Any]:
        return (np.arange(0, count, 3) for count in counts)


def test_planning_holds_little_for_each_document(tmp_path: Path) -> None:
    """A byte, also with a filter of whole streams; its positions would be 8."""
    tasks, count = 40, 50_000
    for folder in ("scan", "plan"):
        (tmp_path / folder).mkdir()
    rng = keyed_generator(9, "scan")
    for rank in range(tasks):
        arrays = {"digests": rng.integers(0, 2**63, (count, 2), np.uint64), "sizes": np.full(count, 9, np.int64)}
        arrays["filtered"] = (np.arange(count) % 5 == 0).astype(np.uint8)
        save_arrays(numbered(tmp_path / "scan", rank, ".npz"), **arrays)
    filters = [{"name": "length", "min_characters": 1}, "test_every_third"]
    config = load_prepare_config(config_with(tmp_path, filters, deduplicate="none"))
    tracemalloc.start()
    try:
        task = {"stream": "a", "units": [["x", 0, 1, 1]]}
        plans = choose_documents(config, tmp_path, [task] * tasks, lambda *arguments: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {tuple(counts[0] for counts in plan.filtered.values()) for plan in plans} == {(10_000, 13_334)}
    assert peak < 6 * tasks * count


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("lenght", "streams.a.filters[0]: unknown filter 'lenght', did you mean 'length'?"),
        ({"name": "regex", "keep": "(unclosed"}, "streams.a.filters[0].keep: not a regular expression: missing ), unterm"),
        ({"name": "regex"}, "streams.a.filters[0]: give keep, drop or both"),
        ("length", "streams.a.filters[0]: give min_characters, max_characters or both"),
        ({"name": "length", "min_characters": 9, "max_characters": 8}, "max_characters (8) is below min_characters"),
        ({"name": "language"}, "streams.a.filters[0].keep: is required and missing"),
        ({"name": "language", "keep": ["en"], "min_score": 0.5}, "score_column and min_score go together"),
        ({"name": "minhash", "bucket": 3}, "streams.a.filters[0]: unknown key 'bucket', did you mean 'buckets'?"),
    ],
)  # fmt: skip
def test_config_faults(tmp_path: Path, node: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_prepare_config(config_with(tmp_path, [node]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_column_is_found_before_anything_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "1.jsonl", rows())
    message = r"prepare\.yaml: streams\.a\.filters\[0\]: no column 'lnag' in .*1\.jsonl, did you mean 'lang'\?"
    with pytest.raises(ConfigError, match=message):
        run(config_with(tmp_path, [{"name": "language", "keep": ["en"], "column": "lnag"}]))
    (tmp_path / "t.txt").write_text("text")
    source = {"name": "txt", "paths": [str(tmp_path / "t.txt")]}
    with pytest.raises(ConfigError, match=r"filters\[0\]: wants column 'language', but source 'txt' has no columns"):
        run(config_with(tmp_path, [{"name": "language", "keep": ["en"]}], source))
    assert list((tmp_path / "out").iterdir()) == []


def test_column_that_is_missing_or_wrong_in_a_later_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "1.jsonl", [*rows(20), {"text": "no language"}])
    path = config_with(tmp_path, [{"name": "language", "keep": ["en"], "column": "lang"}])
    with pytest.raises(RunError, match=r"1\.jsonl:21: no column 'lang', valid names: text"):
        run(path)
    write_rows(tmp_path / "a" / "1.jsonl", [*rows(20), {"text": "number", "lang": 3}])
    with pytest.raises(RunError, match=r"filter 'language': column 'lang' holds int, expected a string"):
        run(path)


def not_utf8(values: list[bytes]) -> Any:
    import pyarrow as pa

    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


@pytest.mark.parametrize("name", ["jsonl", "parquet", "parquet without the column", "datasets"])
def test_rows_that_are_skipped_for_a_column_stay_skipped_in_later_passes(tmp_path: Path, name: str) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, bad = rows(20), {"text": "no language"}
    table = pa.table({"text": [bad["text"], good[0]["text"]], "lang": not_utf8([b"caf\xe9", b"en"])})
    paths = [str(tmp_path / "a")]
    source: dict[str, Any] = {"name": name.split()[0], "paths": paths}
    reason, wanted = "no column 'lang'", [row["text"] for row in good if row["lang"] == "en"]
    write_rows(tmp_path / "a" / "1.jsonl", [*good[:7], bad, *good[7:], bad])
    if name == "parquet without the column":
        pq.write_table(pa.Table.from_pylist(good), tmp_path / "a" / "1.parquet")
        pq.write_table(pa.Table.from_pylist([bad]), tmp_path / "a" / "2.parquet")
    elif name != "jsonl":
        reason, wanted = "not UTF-8", wanted[:1]
        pq.write_table(table, tmp_path / "a" / "1.parquet")
        datasets.Dataset(table).save_to_disk(str(tmp_path / "hf"))
    if name == "datasets":
        source = {"name": name, "path": str(tmp_path / "hf")}
    filters = [{"name": "language", "keep": ["en"], "column": "lang"}, "minhash"]
    node = {"source": source, "on_error": "skip", "filters": filters}
    output = run(config_file(tmp_path, streams={"a": node}, validation_fraction=0))
    assert read_texts(output / "a" / "train") == wanted
    skipped = open_stream(output / "a" / "train").manifest.skipped["documents"]
    assert skipped == {reason: 2 if name == "jsonl" else 1}


def test_every_config_of_the_repository_loads() -> None:
    for path in sorted(Path("configs/data").glob("*.yaml")):
        config = load_prepare_config(path)
        assert yaml.safe_load(path.read_text())["output"] == config.output
