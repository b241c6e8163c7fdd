"""Retrieval on BEIR folders and tasks of mteb: BM25, one vector for each text or token, as a model is and tuned."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from evals.beir import Example, RetrievalSet, read_beir, read_triples, refuse_identical, sampled
from evals.bm25 import Bm25
from evals.contrastive import Encoder, drawn, fine_tune, mined
from evals.interface import EVALS, Cell, CelledEval, EvalConfig, Model, Scores
from evals.ranking import DEPTH, METRICS, PerQuery, Ranking, interval, mean, measured, over_queries, paired
from evals.results import over_seeds
from evals.retrieval_methods import LABEL, Method, Work, encoder_of, spelled_out, work_of
from flexbert_core.schema import ConfigError, Line, UserPath, or_text

# By method and set, for each seed: by metric the values of each query.
_Values = Mapping[str, Mapping[str, Sequence[Mapping[str, PerQuery]]]]


def _listed(node: Any) -> Any:
    return [node] if isinstance(node, str) else node


@EVALS.register("retrieval")
class Retrieval(CelledEval):
    """nDCG@10, recall@100 and MRR@10 of finding documents, by trec_eval, with grades; 95 % intervals over queries."""

    class Config(EvalConfig):
        data: Annotated[list[UserPath], BeforeValidator(_listed), or_text(".", "datasets/scifact")] = Field(
            default=[], description="folders in BEIR's layout"
        )
        mteb: Annotated[list[Line], BeforeValidator(_listed), or_text(".", "SciFact")] = Field(
            default=[],
            description="retrieval tasks of mteb, NAME or NAME:SUBSET, which come from the hub: the network is used",
        )
        split: str = Field(default="test", pattern=LABEL, description="to score by: qrels/SPLIT.tsv")
        methods: list[Annotated[Method, BeforeValidator(spelled_out), or_text(".", "single_vector")]] = Field(  # pyright: ignore[reportAssignmentType]
            ["single_vector"], min_length=1, description="ways to find documents"
        )
        ignore_identical_ids: bool = Field(
            default=False,
            description="leave out a document that has the query's id; folders whose queries are documents (ArguAna) "
            "need it said",
        )
        documents: int | None = Field(
            default=None,
            ge=2,
            description="documents of a set at most: judged ones and drawn others; scores are of that sample",
        )
        queries: int | None = Field(
            default=None, ge=1, description="queries of a set at most, drawn; scores are of that sample"
        )
        batch_size: int = Field(default=32, ge=1, description="texts embedded at once")
        precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")
        resamples: int = Field(default=9999, ge=99, description="draws for intervals and permutation tests")
        seed: int = Field(
            default=0, ge=0, description="of samples, intervals, tests, and of a projection that is not trained"
        )

        @model_validator(mode="after")
        def _check(self) -> Any:
            names = [name for method in self.methods for name in method.labels]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"methods: {twice[0]} stands there twice: give one of them another label")
            for number, method in enumerate(self.methods):
                if method.tune is not None and method.tune.examples == self.split:
                    raise ValueError(f"methods[{number}].tune.examples: {self.split} is what the model is scored by")
            return self

        def packages(self) -> list[str]:
            pylate = ["pylate", "fast_plaid"] if any(method.name == "multi_vector" for method in self.methods) else []
            mteb = ["mteb"] if self.mteb else []
            return ["sentence_transformers", "pytrec_eval", "bm25s", *pylate, *mteb]

    config: Config
    version = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.data and not config.mteb:
            raise ConfigError("give data=FOLDER, a folder in BEIR's layout (or several), or mteb=NAME")
        tunings = [method.tune for method in config.methods if method.tune is not None]
        splits = list(dict.fromkeys([config.split, *(tune.examples for tune in tunings if not tune.of_triples)]))
        sets = [read_beir(Path(folder), splits) for folder in config.data]
        if "ignore_identical_ids" not in config.model_fields_set:
            for each in sets:
                refuse_identical(each, config.split)
        if config.mteb:
            from evals.mteb_data import read_mteb

            sets += [read_mteb(name, splits) for name in config.mteb]
        names = [each.name for each in sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"data: two sets are called {twice[0]!r}: rename a folder")
        self.sets = {
            each.name: sampled(each, config.split, config.documents, config.queries, config.seed) for each in sets
        }
        self.triples = {tune.examples: read_triples(Path(tune.examples)) for tune in tunings if tune.of_triples}
        self._digests = {
            name: hashlib.sha256(repr(examples).encode()).hexdigest()[:16] for name, examples in self.triples.items()
        }
        self.work = work_of(config.methods, names)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        self.precision = auto if config.precision == "auto" else config.precision
        self._bm25: dict[str, Bm25] = {}

    # Cells

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        return [Cell(name, self._settings(work), name.replace("/", "-")) for name, work in self.work.items()]

    def _settings(self, work: Work) -> dict[str, Any]:
        names = ("split", "ignore_identical_ids", "documents", "queries", "seed")
        found: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        found |= {"precision": self.precision, "data": [self.sets[name].digest for name in work.sets]}
        found["method"] = work.method.model_dump(exclude={"label", "untuned", "tune"})
        if work.seed is not None:
            found["tuning"] = work.seed
            left_out = {"seeds", "examples"} if work.tune.of_triples else {"seeds"}  # of triples their bytes count
            found["method"]["tune"] = work.tune.model_dump(exclude=left_out)
            if work.tune.of_triples:
                found["triples"] = self._digests[work.tune.examples]
        return found

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        work = self.work[cell.name]
        seed = self.config.seed if work.seed is None else work.seed
        encoder = encoder_of(work.method, model.folder, self.device, self.precision, seed)
        tuning: dict[str, Any] = {}
        if work.seed is not None:
            tuning = {"tuning": fine_tune(encoder, self._examples(work, encoder, seed), work.tune, seed)}
        of_sets = {name: self._scored(encoder, self.sets[name]) for name in work.sets}
        first = of_sets[work.sets[0]]["rankings"].items()
        shown = {f"{column} ndcg@10".strip(): mean(values["ndcg@10"]) for column, values in first}
        return {**shown, **encoder.facts(), **tuning, "sets": of_sets}

    def _examples(self, work: Work, encoder: Encoder, seed: int) -> list[Example]:
        if work.tune.of_triples:
            return drawn(self.triples[work.tune.examples], work.tune.rows, seed)
        data = self.sets[work.sets[0]]
        examples = mined(data, work.tune, encoder, self._index(data), self.config.batch_size, seed)
        return drawn(examples, work.tune.rows, seed)

    def _index(self, data: RetrievalSet) -> Bm25:
        if data.name not in self._bm25:
            self._bm25 = {data.name: Bm25(data.documents)}  # of the last set only
        return self._bm25[data.name]

    def _scored(self, encoder: Encoder, data: RetrievalSet) -> dict[str, Any]:
        """By ranking and metric the values of each query, and of how many they are."""
        queries = data.splits[self.config.split].queries
        rankings = encoder.rankings(data.documents, queries, DEPTH + 1, self.config.batch_size)
        values = {name: self._measured(data, ranking) for name, ranking in rankings.items()}
        return {"documents": len(data.documents), "queries": len(queries), "rankings": values}

    def _measured(self, data: RetrievalSet, ranking: Ranking) -> dict[str, dict[str, float]]:
        """Of rankings one longer than DEPTH, from which a document may be left out."""
        kept = {}
        for query, row in ranking.items():
            hits = sorted(row.items(), key=lambda hit: -hit[1])
            if self.config.ignore_identical_ids or data.ignore_identical_ids:
                hits = [hit for hit in hits if hit[0] != query]
            kept[query] = dict(hits[:DEPTH])
        return measured(data.splits[self.config.split].relevance, kept)

    # The table

    def _values(self, results: Mapping[str, Any]) -> dict[str, dict[str, list[Mapping[str, PerQuery]]]]:
        found: dict[str, dict[str, list[Mapping[str, PerQuery]]]] = {}
        for name, work in self.work.items():
            for data, result in results[name]["sets"].items():
                for ranking, values in result["rankings"].items():
                    label = f"{work.label} {ranking}".strip()
                    found.setdefault(label, {}).setdefault(data, []).append(values)
        return found

    def _columns(self, values: _Values) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for label, of_sets in values.items():
            for data, metric in itertools.product(self.sets, METRICS):
                of_seeds = [each[metric] for each in of_sets[data]]
                purpose = f"{data} {metric}"  # not of the method, so that equal rankings have equal intervals
                low, high = interval(over_queries(of_seeds), self.config.resamples, self.config.seed, purpose)
                score = {**over_seeds([mean(each) for each in of_seeds]), "low": low, "high": high}
                found[f"{data} {label} {metric}" if len(self.sets) > 1 else f"{label} {metric}"] = score
        if len(self.sets) > 1:
            for label in values:
                means = [found[f"{data} {label} ndcg@10"]["mean"] for data in self.sets]
                found[f"average {label} ndcg@10"] = math.fsum(means) / len(means)
        return found

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        return self._columns(self._values(results))

    def scores_without_model(self) -> Mapping[str, Scores]:
        """BM25's, which stand under each method."""
        found = {}
        for name, data in self.sets.items():
            queries = data.splits[self.config.split].queries
            hits = self._index(data).search(list(queries.values()), DEPTH + 1)
            found[name] = [self._measured(data, dict(zip(queries, hits, strict=True)))]
        columns = {"single_vector": ("",), "multi_vector": (" exact", " plaid")}
        labels = [f"{work.label}{end}" for work in self.work.values() for end in columns[work.method.name]]
        return {"BM25": self._columns(dict.fromkeys(labels, found))}

    def compare(self, results: Mapping[str, Mapping[str, Any]], out: Path) -> list[str]:
        """Paired tests of nDCG@10: each model against the first, and in each what is tuned against what is not."""
        of_models = {label: self._values(each) for label, each in results.items()}
        first = next(iter(of_models))
        untuned = {work.label: work.method.shown for work in self.work.values() if work.seed is not None}
        pairs: list[tuple[str, Any, Any]] = []
        for model, values in of_models.items():
            for label, of_sets in values.items():
                if model != first:
                    pairs.append((f"{label}, {model} less {first}", of_sets, of_models[first][label]))
                method, _, ranking = label.partition(" ")
                plain = f"{untuned.get(method, '')} {ranking}".strip()
                if plain in values:
                    pairs.append((f"{model}, {label} less {plain}", of_sets, values[plain]))
        lines = []
        for text, ours, theirs in pairs:
            for data in self.sets:
                sides = [over_queries([each["ndcg@10"] for each in side[data]]) for side in (ours, theirs)]
                test = paired(sides[0], sides[1], self.config.resamples, self.config.seed, f"{data} {text}")
                lines.append(f"{data} ndcg@10: {text}: {test}")
        return lines
