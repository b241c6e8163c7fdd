"""Rows of the token table for another vocabulary, held against transformers' own models and tokenizers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer

from data.tokenizer import corpus_tokenizer
from flexbert import FlexBertForMaskedLM, build, to_hf
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from tests.helpers.continuing import TERMS, bytes_tokenizer, extended, hf_folder, run_file, write_terms
from tests.helpers.models import tiny
from tests.helpers.texts import WORDS, text_tokenizer
from training.branching import read_origin

OLD_TEXT = "the cat sat on the mat, and a dog runs in paris."
TABLE, BIAS = "encoder.embedding.tokens.weight", "head.decoder_bias"


def started(file: Path, *overrides: str) -> tuple[FlexBertForMaskedLM, Any]:
    """The model that a run of this file begins with, and its record."""
    config = load_run_config(file, overrides)
    start = read_origin(config)
    assert start is not None
    model = FlexBertForMaskedLM(config.model)
    model.load_state_dict(start.weights)
    return model.eval(), start.record


@torch.no_grad()
def logits(model: FlexBertForMaskedLM, ids: Tensor) -> Tensor:
    found = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)).logits
    assert found is not None
    return found


def their_bias(hf: Any) -> Tensor:
    return hf.get_output_embeddings().bias.detach()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@torch.no_grad()
def test_old_tokens_keep_their_logits_and_new_ones_are_the_means_of_their_pieces(tmp_path: Path, kind: str) -> None:
    """Against the model of transformers and its own tokenizer. 1e-5; measured 5e-7, of logits up to 2.5."""
    source = tmp_path / "hf"
    hf = hf_folder(source, kind)
    terms = write_terms(tmp_path)
    tokenizer = extended(source, tmp_path / "tokenizer", terms)
    model, record = started(run_file(tmp_path, str(source), tokenizer, tokens={"add": str(terms)}))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tokenizer))
    old, named = len(before), len(after)
    assert named == old + len(TERMS)
    assert model.config.vocab_size == -(-named // 64) * 64
    ids = before(OLD_TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, after(OLD_TEXT, return_tensors="pt").input_ids)
    found, expected = logits(model, ids[0]), hf(ids).logits[0]
    torch.testing.assert_close(found[:, :old], expected, atol=1e-5, rtol=0)
    weights = model.state_dict()
    for term in TERMS:
        (index,) = after(term, add_special_tokens=False).input_ids
        pieces = before(term, add_special_tokens=False).input_ids
        assert len(pieces) > 1
        torch.testing.assert_close(weights[TABLE][index], hf.get_input_embeddings().weight[pieces].mean(0))
        torch.testing.assert_close(weights[BIAS][index], their_bias(hf)[pieces].mean())
        torch.testing.assert_close(found[:, index], expected[:, pieces].mean(1), atol=1e-5, rtol=0)
    assert float(found.softmax(1)[:, named:].sum(1).max()) < 1e-6, "ids without a token have a share of the softmax"
    assert torch.equal(weights[TABLE][:old], hf.get_input_embeddings().weight)
    assert record["vocabulary"] == {"new": 50, "init": "mean-of-pieces", "copied": old, "first": list(TERMS[:3])}


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_new_token_on_a_spare_row_is_new(tmp_path: Path, tied: bool) -> None:
    """An export of ours has rows beyond its tokens, up to a multiple of 64; terms take them. A decoder of its own has
    them, too."""
    source = tmp_path / "export"
    model = build(tiny(vocab_size=128, head={"name": "mlm", "decoder_bias": True, "tied": tied}), seed=4)
    assert model.head.decoder_bias is not None
    model.head.decoder_bias.copy_(torch.randn(128))
    to_hf(model, text_tokenizer(), source)
    named = len(text_tokenizer())
    tokenizer = extended(source, tmp_path / "tokenizer", write_terms(tmp_path))
    assert named + len(TERMS) <= 128
    weights, old = started(run_file(tmp_path, str(source), tokenizer))[0].state_dict(), model.state_dict()
    pieces = text_tokenizer()(TERMS[0], add_special_tokens=False).input_ids
    for name in (TABLE, BIAS, *([] if tied else ["head.output.weight"])):
        assert len(weights[name]) == 128
        torch.testing.assert_close(weights[name][named], old[name][pieces].mean(0))
        assert torch.equal(weights[name][:named], old[name][:named])


@torch.no_grad()
def test_other_starts_of_new_tokens(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    table = hf_folder(source, "bert").get_input_embeddings().weight
    tokenizer = extended(source, tmp_path / "tokenizer", write_terms(tmp_path))
    file = run_file(tmp_path, str(source), tokenizer)
    new = slice(len(table), len(table) + len(TERMS))
    means = started(file, "tokens.init=mean")[0].state_dict()
    torch.testing.assert_close(means[TABLE][new], table.mean(0).expand(len(TERMS), -1))
    drawn, again, other = (
        started(file, "tokens.init=normal", f"seed={seed}")[0].state_dict()[TABLE][new] for seed in (1, 1, 2)
    )
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert len(drawn.unique(dim=0)) == len(TERMS)
    scores = (drawn - table.mean(0)) / table.std(0)
    assert abs(float(scores.mean())) < 0.1  # 1,600 draws: its deviation is 0.025
    assert abs(float(scores.std()) - 1) < 0.1


def test_a_token_of_which_no_piece_is_known_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "hf"
    table = hf_folder(source, "bert").get_input_embeddings().weight
    tokenizer = extended(source, tmp_path / "tokenizer", write_terms(tmp_path, ["☃", "kinase"]))
    weights = started(run_file(tmp_path, str(source), tokenizer))[0].state_dict()
    torch.testing.assert_close(weights[TABLE][len(table)], table.mean(0))
    assert (
        "tokens: of 1 new tokens the model's tokenizer knows no piece, so they start as the mean of all: '☃'"
        in caplog.text
    )


@torch.no_grad()
def test_another_tokenizer_keeps_the_rows_of_shared_tokens(tmp_path: Path) -> None:
    """Fewer words, in another order, some new; special tokens that have other names."""
    source = tmp_path / "hf"
    hf = hf_folder(source, "bert")
    words = ("kinase", "berlin", "the", "##osome", "##ing", "dog")
    renamed = text_tokenizer(words)
    backend = renamed.backend_tokenizer.to_str().replace("[MASK]", "<mask>").replace("[UNK]", "<unk>")
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "pad")}
    other = type(renamed)(
        tokenizer_object=type(renamed.backend_tokenizer).from_str(backend),
        mask_token="<mask>",
        unk_token="<unk>",
        **names,
    )
    other.save_pretrained(tmp_path / "other")
    tokenizer = extended(tmp_path / "other", tmp_path / "tokenizer", None)
    file = run_file(tmp_path, str(source), tokenizer, tokens={"other_tokenizer": True})
    model, record = started(file)
    assert model.config.vocab_size == 128
    weights, table = model.state_dict(), hf.get_input_embeddings().weight
    theirs, ours = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (source, tokenizer))
    theirs |= {"<mask>": theirs["[MASK]"], "<unk>": theirs["[UNK]"]}
    shared = sorted(ours.keys() & theirs.keys())
    assert len(shared) == len(ours) - 2
    assert any(ours[token] != theirs[token] for token in shared)
    for token in shared:
        assert torch.equal(weights[TABLE][ours[token]], table[theirs[token]]), token
        assert torch.equal(weights[BIAS][ours[token]], their_bias(hf)[theirs[token]]), token
    for token, text in (("kinase", "kinase"), ("##osome", "osome")):
        pieces = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False).input_ids
        torch.testing.assert_close(weights[TABLE][ours[token]], table[pieces].mean(0))
    assert (record["vocabulary"]["copied"], record["vocabulary"]["new"]) == (len(shared), 2)
    # The same text: the logits of shared tokens are those of the model of transformers
    text = "the dog, berlin"
    there, here = (
        AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids for folder in (source, tokenizer)
    )
    assert there.shape == here.shape
    columns = [[vocabulary[token] for token in shared] for vocabulary in (ours, theirs)]
    found, expected = logits(model, here[0]), hf(there).logits[0]
    torch.testing.assert_close(found[:, columns[0]], expected[:, columns[1]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_from_pieces_of_words_to_bytes(tmp_path: Path) -> None:
    """`the` of a WordPiece vocabulary is `Ġthe` of a byte-level one, and `##s` is `s`."""
    source = tmp_path / "hf"
    table = hf_folder(source, "bert").get_input_embeddings().weight
    bytes_tokenizer(tmp_path / "tokenizer", texts=["the cat, a cat. the dogs"] * 9)
    file = run_file(tmp_path, str(source), tmp_path / "tokenizer", tokens={"other_tokenizer": True})
    weights = started(file)[0].state_dict()[TABLE]
    theirs, ours = (corpus_tokenizer(folder).get_vocab() for folder in (source, tmp_path / "tokenizer"))
    for here, there in (("Ġthe", "the"), ("s", "##s"), ("Ġa", "a"), ("[MASK]", "[MASK]"), (",", ","), (".", ".")):
        assert torch.equal(weights[ours[here]], table[theirs[there]]), here
    torch.testing.assert_close(weights[ours["Ġ"]], table.mean(0))  # a blank alone has no pieces there
    assert WORDS[0] == "the"


@torch.no_grad()
def test_from_pieces_of_words_to_sentencepiece(tmp_path: Path) -> None:
    """`the` of a WordPiece vocabulary is `▁the` there, and `##s` is `s`."""
    source = tmp_path / "hf"
    table = hf_folder(source, "bert").get_input_embeddings().weight
    pieces = ["<unk>", "▁the", "s", "▁", "▁cat", "a", "▁kinase", "."]
    backend = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.save(str(tmp_path / "other.json"))
    tokenizer = extended(tmp_path / "other.json", tmp_path / "tokenizer", None)
    weights = started(run_file(tmp_path, str(source), tokenizer, tokens={"other_tokenizer": True}))[0].state_dict()[
        TABLE
    ]
    theirs, ours = (corpus_tokenizer(folder).get_vocab() for folder in (source, tokenizer))
    shared = {"▁the": "the", "s": "##s", "▁cat": "cat", "a": "##a", ".": ".", "[MASK]": "[MASK]", "<unk>": "[UNK]"}
    for here, there in shared.items():
        assert torch.equal(weights[ours[here]], table[theirs[there]]), here
    spelled = AutoTokenizer.from_pretrained(source)("kinase", add_special_tokens=False).input_ids
    torch.testing.assert_close(weights[ours["▁kinase"]], table[spelled].mean(0))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokens": {"add": "{folder}/more.txt"}}, "tokens.add: {folder}/more.txt: line 2: 'zymosan' is no token of data.tokenizer {folder}/tokenizer: prepare the streams with"),
        ({"tokens": {"add": "{folder}/unknown.txt"}}, "tokens.add: {folder}/unknown.txt: line 2: '\u2603' is no token of data.tokenizer {folder}/tokenizer: prepare"),
        ({"tokens": {"add": "{folder}/unknown.txt"}, "data": {"tokenizer": "{folder}/no-unk", "streams": {"old": {"path": "{folder}"}}}}, "tokens.add: {folder}/unknown.txt: line 1: 'kinase' is no token of data.tokenizer {folder}/no-unk: prepare"),
        ({"tokens": {"add": "{folder}/none.txt"}}, "tokens.add: {folder}/none.txt: cannot be read: No such file or directory"),
        ({"from": "{folder}/other"}, "data.tokenizer: {folder}/tokenizer: is not the tokenizer of {folder}/other: "),
        ({"from": "{folder}/bare", "tokens": {"other_tokenizer": True}}, "tokens: {folder}/bare holds no tokenizer.json, so what is new cannot be told"),
        ({"tokens": {"other_tokenizer": True}}, "tokens.other_tokenizer: {folder}/tokenizer has all tokens of {folder}/hf under their ids: it is no other one"),
        ({"from": "hf:org/none"}, "from: hf:org/none: cannot be had from the Hugging Face hub: "),
        ({"from": "{folder}/headless"}, "from: {folder}/headless: cls.predictions.bias: missing in the weights: an encoder without a masked-token head goes on with `from: {{checkpoint: ..., fresh_head: true}}`"),
        ({"from": "{folder}"}, "model: is `from`, and from: {folder}: is no Hugging Face folder (no config.json in it)"),
        ({"from": "~nosuchuser/x"}, "train.yaml: from: '~nosuchuser/x': ~nosuchuser has no home folder here"),
        ({"from": "a" * 300}, "train.yaml: from: expected a path of names of at most 255 bytes"),
        ({"from": "a" * 300, "model": "modernbert-tiny"}, "train.yaml: from.checkpoint: expected a path of names of at most 255 bytes"),
        ({"runs": "~nosuchuser/x"}, "train.yaml: runs: '~nosuchuser/x': ~nosuchuser has no home folder here"),
        ({"name": "a" * 300}, "train.yaml: name: expected a path of names of at most 255 bytes"),
        ({"from": None}, "model: is `from`, and the file says no `from`"),
        ({"from": None, "model": "modernbert-tiny", "tokens": {"init": "mean"}}, "tokens: says what becomes of the tokens of a model that `from` names: give that, too"),
        ({"tokens": {"init": "mean_of_pieces"}}, "tokens.init: should be 'mean-of-pieces', 'mean' or 'normal', got 'mean_of_pieces'"),
        ({"model": {"preset": "from", "vocab_size": 64}}, "model.vocab_size: is 64, the model that `from` names has 76 rows: set model.vocab_size=128"),
    ],
)  # fmt: skip
def test_what_cannot_begin_is_one_line(
    tmp_path: Path, changes: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = tmp_path / "hf"
    hf_folder(source, "bert")
    hf_folder(tmp_path / "headless", "bert", headless=True)
    hf_folder(tmp_path / "bare", "bert")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    hf_folder(tmp_path / "other", "bert")
    text_tokenizer(tuple(reversed(WORDS))).save_pretrained(tmp_path / "other")
    (tmp_path / "more.txt").write_text("kinase\nzymosan\n")
    (tmp_path / "unknown.txt").write_text("kinase\n\u2603\n")  # one [UNK]
    (tmp_path / "no-unk").mkdir()
    Tokenizer(models.BPE({"a": 0}, [], unk_token="[UNK]")).save(str(tmp_path / "no-unk" / "tokenizer.json"))
    tokenizer = extended(source, tmp_path / "tokenizer", write_terms(tmp_path))
    filled = {key: _fill(value, tmp_path) for key, value in changes.items()}
    file = run_file(tmp_path, str(source), tokenizer, **filled)
    with pytest.raises(ConfigError) as error:
        started(file)
    assert line.format(folder=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def _fill(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _fill(each, folder) for key, each in value.items()}
    return value.format(folder=folder) if isinstance(value, str) else value


@torch.no_grad()
def test_an_encoder_without_a_head_goes_on_with_a_fresh_one(tmp_path: Path) -> None:
    source = tmp_path / "headless"
    hf = hf_folder(source, "bert", headless=True)
    tokenizer = extended(source, tmp_path / "tokenizer", write_terms(tmp_path))
    origin = {"checkpoint": str(source), "fresh_head": True}
    model, again = (started(run_file(tmp_path, origin, tokenizer), f"seed={seed}")[0] for seed in (1, 1))
    other = started(run_file(tmp_path, origin, tokenizer), "seed=2")[0]
    ids = AutoTokenizer.from_pretrained(source)(OLD_TEXT, return_tensors="pt").input_ids
    states = model.encoder(ids[0], torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.shape[1])
    torch.testing.assert_close(states, hf(ids).last_hidden_state[0], atol=1e-5, rtol=0)
    heads = [
        {name: tensor for name, tensor in each.state_dict().items() if name.startswith("head.")}
        for each in (model, again, other)
    ]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]["head.dense.weight"], heads[2]["head.dense.weight"])
    assert model.head.decoder_bias is not None
    assert not model.head.decoder_bias.any()
