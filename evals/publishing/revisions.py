"""What a run has to publish: a revision for each export, with a card, a picture, and sentence-transformers' files."""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.step_log import read_lines
from evals.models import digest_of
from evals.publishing.card import CardFacts, Result, model_card
from evals.publishing.shareable import training_config
from evals.results import numbers
from recipe.config import RunConfig
from recipe.origin import read_origin_record
from recipe.phases import PhasePlan
from training.curves import draw_until
from training.folder import RunFolder

log = logging.getLogger(__name__)

Content = Path | bytes
_NAME = re.compile(r"tokens-(\d+)(-ema)?")
_FORM = 1  # raised when revisions get another form, so that older ones are looked at again
_POOLERS = {"bert", "roberta"}  # whose AutoModel would make one of random weights, and warn
_TASKS = {"glue": "text-classification"}


@dataclass(frozen=True)
class Revision:
    """An export as it is published. stamp: another one when any of its files may have changed."""

    name: str
    tokens: int
    average: bool
    stamp: str
    _made: Mapping[str, bytes]
    _export: Path
    _pictures: "_Pictures | None"

    def files(self) -> dict[str, Content]:
        """By their paths in it; large ones as files."""
        files: dict[str, Content] = {
            str(path.relative_to(self._export)): path for path in sorted(self._export.rglob("*")) if path.is_file()
        }
        files |= self._made
        if self._pictures is not None:
            files["curves.png"] = self._pictures.until(self.tokens)
        return dict(sorted(files.items()))


class _Pictures:
    """The curves of a run, drawn when asked for, once."""

    def __init__(self, metrics: Path, plan: PhasePlan) -> None:
        self._metrics, self._plan, self._drawn = metrics, plan, dict[int, bytes]()

    def until(self, tokens: int) -> bytes:
        if tokens not in self._drawn:
            with tempfile.TemporaryDirectory() as scratch:
                picture = Path(scratch) / "curves.png"
                draw_until(self._metrics, picture, self._plan, tokens)
                self._drawn[tokens] = picture.read_bytes()
        return self._drawn[tokens]


def find_revisions(folder: RunFolder, config: RunConfig, results: Sequence[Path] = ()) -> list[Revision]:
    """Those of a run's exports that are whole, by tokens, an average behind its weights. results: folders whose
    results.json, of `main.py eval`, count beside those in RUN/evaluations."""
    plan, origin = PhasePlan(config), read_origin_record(folder.path)
    lines = list(read_lines(folder.metrics))
    ledger = {line["step"]: line["streams"] for line in read_lines(folder.ledger) if "streams" in line}
    measured = _measured([folder.path / "evaluations", *results])
    pictures = _Pictures(folder.metrics, plan)
    shared, found = training_config(config).encode(), []
    for path in sorted(folder.exports.glob("tokens-*"), key=_order):
        match = _NAME.fullmatch(path.name)
        if match is None or not (path / "config.json").is_file() or not (path / "README.md").is_file():
            continue
        tokens, average = int(match[1]), match[2] is not None
        seen = ledger.get(plan.step_of(tokens), {})
        picture = any(line.get("loss") is not None and line["tokens"] <= tokens for line in lines)
        facts = CardFacts(
            path.name,
            tokens,
            [*_held_out(lines, tokens, average), *_of_export(measured, path, tokens)],
            {name: int(counts["tokens"]) for name, counts in seen.items()},
            picture,
        )
        made = {"README.md": model_card(path, config, origin, facts).encode(), "training_config.yaml": shared}
        made |= _of_sentence_transformers(path)
        stamp = _stamp(path, made)
        found.append(Revision(path.name, tokens, average, stamp, made, path, pictures if picture else None))
    return found


def _order(path: Path) -> tuple[int, str]:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]) if match else -1, path.name)


def _stamp(export: Path, made: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(str(_FORM).encode())
    for path in sorted(path for path in export.rglob("*") if path.is_file()):
        facts = path.stat()
        digest.update(f"{path.relative_to(export)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for name, content in sorted(made.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _held_out(lines: Sequence[dict[str, Any]], tokens: int, average: bool) -> list[Result]:
    key = "validation_ema" if average else "validation"
    scores = next((line[key] for line in lines if line["tokens"] == tokens and line.get(key)), {})
    wanted = {"loss": "held-out loss (nats)", "masked_accuracy": "masked accuracy"}
    return [
        Result("fill-mask", "held-out text", metric, float(scores[name]))
        for name, metric in wanted.items()
        if scores.get(name) is not None
    ]


def _measured(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The complete results.json below these folders; others are left out, said."""
    found = []
    for file in sorted({file.resolve() for folder in folders for file in folder.rglob("results.json")}):
        try:
            node = json.loads(file.read_text())
            if node["complete"]:
                assert node["evaluation"], node["model"]["digest"]
                found.append(node)
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            log.warning("%s: no results of `main.py eval`: left out of the model cards", file)
    return found


def _of_export(measured: Sequence[dict[str, Any]], export: Path, tokens: int) -> list[Result]:
    """Those that were measured with this very export: its weights, and not its name, decide. Where it was measured
    under several names the newest counts."""
    mine = [node for node in measured if node["model"].get("tokens") in (tokens, None)]
    if not mine:
        return []
    digest = digest_of(export)
    newest = {
        node["evaluation"]: node
        for node in sorted(mine, key=lambda node: str(node.get("written")))
        if node["model"]["digest"] == digest
    }
    return [
        Result(str(_TASKS.get(node["config"]["name"], node["config"]["name"])), node["evaluation"], name, float(value))
        for node in newest.values()
        for name, value in numbers(node["scores"]).items()
    ]


def _of_sentence_transformers(export: Path) -> dict[str, bytes]:
    """Its modules: the model, then the mean over the last hidden states. Without them it guesses, and warns."""
    config = json.loads((export / "config.json").read_text())
    width = config.get("hidden_size") or config["flexbert"]["hidden_size"]
    longest = json.loads((export / "tokenizer_config.json").read_text())["model_max_length"]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    transformer: dict[str, Any] = {"max_seq_length": longest, "do_lower_case": False}
    if config.get("model_type") in _POOLERS:
        transformer["model_args"] = {"add_pooling_layer": False}
    nodes: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
    }
    return {name: (json.dumps(node, indent=1) + "\n").encode() for name, node in nodes.items()}
