"""What prepare writes, recounted by independent means; choices that must not depend on workers, order or neighbours."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from streaming.base.format import reader_from_json
from tokenizers import Tokenizer, models, pre_tokenizers

from data.preparation.dataset import load_prepare_config
from data.preparation.output import claim
from data.preparation.writing import cut_text
from data.store.shards import open_stream
from data.tokenizer import corpus_tokenizer, tokenizer_facts
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.preparing import config_file, documents, files, interrupt, read_texts, run, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = documents(400)
    write_jsonl(folder / "a" / "1.jsonl", [*texts[:150], "", texts[3]])
    write_jsonl(folder / "a" / "2.jsonl", [*texts[150:250], texts[200], "", "", texts[10]])
    write_jsonl(folder / "b" / "1.jsonl", [*texts[250:], texts[0], texts[399]])
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Path:
    return run(config_file(corpus))


def test_every_document_is_there_once_and_in_order(prepared: Path) -> None:
    texts = documents(400)
    for name, expected in (("a", texts[:250]), ("b", texts[250:])):
        train, validation = (read_texts(prepared / name / split) for split in ("train", "validation"))
        held_out = set(validation)
        assert validation == [text for text in expected if text in held_out]
        assert train == [text for text in expected if text not in held_out]
        assert 5 <= len(validation) <= 45  # 10 % of 250 or 150


def test_manifest_equals_a_recount(prepared: Path) -> None:
    empties = {"a": 0, "b": 0}
    duplicates = {"a": 0, "b": 0}
    for name in ("a", "b"):
        for split in ("train", "validation"):
            folder = prepared / name / split
            manifest = open_stream(folder).manifest
            index = json.loads((folder / "index.json").read_text())
            assert [shard["raw_data"]["basename"] for shard in index["shards"]] == [
                shard.file for shard in manifest.shards
            ]
            histogram: dict[str, int] = {}
            counts = np.zeros(manifest.vocab_size, np.uint64)
            for info, shard in zip(manifest.shards, index["shards"], strict=True):
                reader = reader_from_json(str(folder), None, shard)
                samples = [reader[number]["tokens"] for number in range(len(reader))]
                assert all(sample.dtype == np.uint16 for sample in samples)
                assert info.documents == len(samples)
                assert info.tokens == sum(map(len, samples))
                assert info.bytes == (folder / info.file).stat().st_size <= 16384
                for sample in samples:
                    edge = str(2 ** int(np.log2(len(sample))))
                    histogram[edge] = histogram.get(edge, 0) + 1
                    np.add.at(counts, sample, 1)
            texts = read_texts(folder)
            assert manifest.length_histogram == histogram
            assert manifest.documents == len(texts)
            assert manifest.tokens == counts.sum()
            assert manifest.bytes == sum(len(text.encode()) for text in texts)
            assert np.array_equal(np.load(folder / "token_counts.npy"), counts)
            assert manifest.source == {"name": "jsonl", "paths": [str(prepared.parent / name)], "text_column": "text"}
            facts = tokenizer_facts(prepared / "tokenizer")
            assert (manifest.tokenizer_fingerprint, manifest.special_ids) == (facts.fingerprint, facts.special_ids)
            assert counts[facts.special_ids].sum() == 0
            empties[name] += manifest.empty_documents
            duplicates[name] += manifest.duplicate_documents
            assert len(manifest.shards) > 1 or split == "validation"
    assert empties == {"a": 3, "b": 0}
    assert duplicates == {"a": 3, "b": 2}  # texts[0] in b is a copy of one in a


def test_workers_do_not_show_and_rerun_is_at_once(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parallel = run(config_file(corpus), f"output={tmp_path / 'parallel'}", workers=3)
    assert files(parallel) == files(prepared)
    before = {path: path.stat().st_mtime_ns for path in parallel.rglob("*.mds")}
    capsys.readouterr()
    run(config_file(corpus), f"output={tmp_path / 'parallel'}")
    assert "already prepared" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in parallel.rglob("*.mds")} == before


def test_another_config_in_the_same_folder(corpus: Path, prepared: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"output: .*out was prepared with another config \(seed was 17, is 18; shard"
    ):
        run(config_file(corpus), "seed=18", "shard_bytes=20000")
    node = yaml.safe_load(config_file(corpus).read_text())
    swapped = config_file(corpus, streams=dict(reversed(node["streams"].items())))
    with pytest.raises(ConfigError, match="streams: the order was a, b, is b, a"):
        run(swapped)


def test_foreign_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no dataset of ours: choose another folder"):
        run(config_file(corpus), f"output={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_claim_has_left_is_no_foreign_folder(corpus: Path, tmp_path: Path) -> None:
    """A full disk, or a kill, while the very first file is written."""
    (tmp_path / "out").mkdir()
    half = tmp_path / "out" / ".unfinished-prepare.json"
    half.symlink_to("/dev/full")
    config = load_prepare_config(config_file(corpus), [f"output={tmp_path / 'out'}"])
    with pytest.raises(RunError, match=r"out: No space left on device$"):
        claim(config, tmp_path / "out")
    half.write_text("{")
    assert not claim(config, tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [".work", "prepare.json"]


def test_split_of_a_text_does_not_depend_on_its_neighbours(prepared: Path, tmp_path: Path) -> None:
    texts = documents(400)
    write_jsonl(tmp_path / "a" / "x.jsonl", [*documents(30, first=1000), *texts[100:250][::-1]])
    write_jsonl(tmp_path / "b" / "x.jsonl", texts[:100] + texts[250:])
    other = run(config_file(tmp_path))
    before = {text for name in ("a", "b") for text in read_texts(prepared / name / "validation")}
    after = {text for name in ("a", "b") for text in read_texts(other / name / "validation")}
    assert after & set(texts) == before
    reseeded = run(config_file(tmp_path), "seed=18", f"output={tmp_path / 'seed'}")
    assert {text for name in ("a", "b") for text in read_texts(reseeded / name / "validation")} & set(texts) != before


@pytest.mark.parametrize(
    ("deduplicate", "counts"), [("dataset", (250, 150)), ("stream", (250, 151)), ("none", (253, 152))]
)
def test_deduplicate(corpus: Path, tmp_path: Path, deduplicate: str, counts: tuple[int, int]) -> None:
    output = run(
        config_file(corpus), f"output={tmp_path / 'out'}", f"deduplicate={deduplicate}", "validation_fraction=0"
    )
    assert tuple(len(read_texts(output / name / "train")) for name in ("a", "b")) == counts
    assert not (output / "a" / "validation").exists()


def test_max_bytes_draws_from_the_whole_source(corpus: Path, tmp_path: Path) -> None:
    output = run(config_file(corpus), f"output={tmp_path / 'out'}", "streams.a.max_bytes=60K")
    kept = [text for split in ("train", "validation") for text in read_texts(output / "a" / split)]
    assert 57_000 < sum(len(text.encode()) for text in kept) <= 60_000
    numbers = [int(text.split(" ", 1)[0]) for text in kept]
    assert min(numbers) < 50
    assert max(numbers) > 200
    half = run(config_file(corpus), f"output={tmp_path / 'half'}", "streams.a.max_bytes=30K")
    assert {text for split in ("train", "validation") for text in read_texts(half / "a" / split)} < set(kept)


def test_wide_vocabulary_and_documents_without_tokens(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "[MASK]": 1} | {f"w{number}": number for number in range(2, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "wide.json"))
    write_jsonl(tmp_path / "a" / "1.jsonl", ["w2 w69999 missing [MASK] w65536", " ", "w3"])
    write_jsonl(tmp_path / "b" / "1.jsonl", ["w4"])
    path = config_file(tmp_path, tokenizer={"name": "load", "path": str(tmp_path / "wide.json")}, validation_fraction=0)
    stream = open_stream(run(path) / "a" / "train")
    assert stream.manifest.dtype == "uint32"
    # A vocabulary of whole words holds "[MASK]" itself: raw text must not give the special token.
    assert stream.document(0, 0).tolist() == [2, 69_999, 0, 0, 65_536]
    assert stream.manifest.documents == 2
    assert stream.manifest.empty_documents == 1
    assert stream.manifest.vocab_size == 70_016


def test_document_longer_than_a_shard(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "1.jsonl", ["short", "long " * 50_000, "short again"])
    write_jsonl(tmp_path / "b" / "1.jsonl", ["b"])
    output = run(config_file(tmp_path, validation_fraction=0))
    assert read_texts(output / "a" / "train") == ["short", "long " * 50_000, "short again"]


def test_cut_pieces_are_tokenised_as_the_whole(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = corpus_tokenizer(prepared / "tokenizer")
    text = "\n \n\n  indented\n\t\n  \n".join(documents(20))
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for characters in range(2000, 2040):
        monkeypatch.setattr("data.preparation.writing.CUT_CHARACTERS", characters)
        pieces = list(cut_text(text))
        assert len(pieces) > 5
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids] == whole
    assert "".join(cut_text("x" * 10_000)) == "x" * 10_000


def most_memory() -> int:
    """The most memory that this process has held since it was asked to forget, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def test_memory_of_a_long_document(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's result takes some 100 times a text's size: only one piece's is there at a time."""
    monkeypatch.setattr("data.preparation.writing.CUT_CHARACTERS", 2**16)
    text = "\n".join(documents(3000))
    write_jsonl(tmp_path / "a" / "1.jsonl", ["short", text, "short again"])
    write_jsonl(tmp_path / "b" / "1.jsonl", ["b"])
    path = config_file(tmp_path, validation_fraction=0, tokenizer={"name": "load", "path": str(prepared / "tokenizer")})
    Path("/proc/self/clear_refs").write_text("5")
    before = most_memory()
    output = run(path)
    assert most_memory() - before < 20 * len(text)
    assert read_texts(output / "a" / "train") == ["short", text, "short again"]


def test_a_document_that_no_shard_can_hold(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preparation.writing.MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(
        RunError, match=r"1\.jsonl: document that begins '0 .*': gives \d+ tokens, more than a shard can"
    ):
        run(config_file(corpus), f"output={tmp_path / 'out'}")


def test_the_tokenizer_is_trained_on_all_places_of_a_stream(tmp_path: Path) -> None:
    """16 files, each one document of its own letters, and a sample as large as one of them."""
    words = [chr(97 + number) * 3 + chr(97 + number + 1) * 3 for number in range(16)]
    for number, word in enumerate(words):
        (tmp_path / f"{number:02d}.txt").write_text(f"{word} " * 10_000)
    source = {"name": "txt", "paths": [str(tmp_path / "*.txt")]}
    tokenizer = {"name": "train", "vocab_size": 384, "sample_bytes": 70_000}
    output = run(config_file(tmp_path, streams={"a": {"source": source}}, validation_fraction=0, tokenizer=tokenizer))
    loaded = corpus_tokenizer(output / "tokenizer")
    assert {word for word in words if len(loaded.encode(f" {word}", add_special_tokens=False).ids) == 1} == set(words)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokeniser=x"], "prepare.yaml: unknown key 'tokeniser', did you mean 'tokenizer'?"),
        (
            ["streams.a.source.name=jsnl"],
            "prepare.yaml: streams.a.source: unknown source 'jsnl', did you mean 'jsonl'?",
        ),
        (["streams.a.source.path=x"], "prepare.yaml: streams.a.source: unknown key 'path', did you mean 'paths'?"),
        (["validation_fraction=1.5"], "prepare.yaml: validation_fraction: should be less than 1, got 1.5"),
        (
            ["streams.A.source={name: builtin, part: python-docs}"],
            "streams.A: 'a' is the same name on some file systems",
        ),
        (
            ["streams.tokenizer.source={name: builtin, part: python-docs}"],
            "streams.tokenizer: a stream's name is a folder",
        ),
        (
            ["streams.a.validation_fraction=0.5", "deduplicate=none"],
            "streams.a.validation_fraction: needs deduplicate: dataset",
        ),
        (["shard_bytes=8B"], "shard_bytes: should be less than 4294967296"),
        (["streams.a.max_bytes=lots"], "streams.a.max_bytes: expected a count such as 50B"),
    ],
)
def test_config_faults(corpus: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_prepare_config(config_file(corpus), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["streams.b.source.paths=[none/*.jsonl]"],
            "prepare.yaml: streams.b.source.paths: nothing matches 'none/*.jsonl'",
        ),
        (["validation_fraction=0.0001"], "streams.a: none of its 250 documents falls into validation: raise"),
        (["validation_fraction=0.99999"], "streams.a: all of its 250 documents fall into validation: lower"),
        (["streams.a.max_bytes=1"], "streams.a: holds no document: 3 duplicates, 253 over max_bytes"),
    ],
)
def test_faults_found_before_tokenising(corpus: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(config_file(corpus), f"output={tmp_path / 'out'}", *overrides)
    assert message in str(error.value)


def test_bad_line_is_one_clear_error_from_a_worker(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / name / "1.jsonl", documents(20))
    with (tmp_path / "b" / "1.jsonl").open("a") as file:
        file.write('{"tex')
    with pytest.raises(RunError, match=r"b/1\.jsonl:21: not valid JSON"):
        run(config_file(tmp_path), workers=2)


def test_wrong_config_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out'}"
    path = config_file(corpus, tokenizer={"name": "load", "path": "nowhere"})
    with pytest.raises(ConfigError, match=r"prepare\.yaml: tokenizer\.path: no such file or folder: 'nowhere'"):
        run(path, output)
    assert list((tmp_path / "out").iterdir()) == []
    run(config_file(corpus), output)


def test_source_that_changes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(40)
    write_jsonl(tmp_path / "a" / "1.jsonl", texts)
    write_jsonl(tmp_path / "b" / "1.jsonl", documents(40, first=500))
    path = config_file(tmp_path)
    interrupt(path, monkeypatch)
    write_jsonl(tmp_path / "a" / "1.jsonl", [texts[0].replace("a", "o"), *texts[1:]])  # the same number of bytes
    with pytest.raises(
        RunError, match=r"a/1\.jsonl: changed while it was being prepared: delete .*out and prepare again"
    ):
        run(path)
    write_jsonl(tmp_path / "a" / "1.jsonl", texts[1:])
    with pytest.raises(
        RunError, match=r"out: the sources have changed since this was begun: delete it and prepare again"
    ):
        run(path)


def test_corrected_line_is_read_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / name / "1.jsonl", documents(40, first=0 if name == "a" else 40))
    good = (tmp_path / "b" / "1.jsonl").read_bytes()
    (tmp_path / "b" / "1.jsonl").write_bytes(good + b"{")
    with pytest.raises(RunError, match="not valid JSON"):
        run(config_file(tmp_path))
    (tmp_path / "b" / "1.jsonl").write_bytes(good + b'{"text": "more"}')
    output = run(config_file(tmp_path))
    found = {
        text for name in ("a", "b") for split in ("train", "validation") for text in read_texts(output / name / split)
    }
    assert found == {*documents(80), "more"}


def test_demo_config_is_valid() -> None:
    config = load_prepare_config("configs/data/demo.yaml")
    assert len(config.streams) >= 3
