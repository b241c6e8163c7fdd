"""Speed and memory of encoders: the protocol of arXiv 2412.13663, table 2, ours and transformers' runtime by turns.

Documents of random tokens, of one length or of lengths drawn from a normal distribution around half of the longest, go
through the encoder in the largest batches that fit, in no order of length. Tokens are counted without padding.
"""

import platform
import statistics
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from data.keyed import keyed_generator
from evals.classifiers import load_tokenizer, longest
from evals.interface import EVALS, LONGER, Cell, CelledEval, EvalConfig, Model, Scores, distinct
from evals.loading import Runtime, known, model_type, precision_of
from evals.speed import Encoder, fits_on_gpu, largest_batch
from flexbert_core.schema import RunError, Schema


class Lengths(Schema):
    """Documents of up to `longest` tokens; the drawn lengths are N(mean, deviation), cut to 1 ... longest."""

    longest: int = Field(ge=1, description="tokens of the fixed lengths, and of a drawn one at most")
    mean: float = Field(gt=0, description="of the drawn lengths")
    deviation: float = Field(ge=0, description="of the drawn lengths")


_SHORT, _LONG = (
    Lengths(longest=512, mean=256, deviation=64),
    Lengths(longest=8192, mean=4096, deviation=1024),
)


@EVALS.register("efficiency")
class Efficiency(CelledEval):
    """tokens/s of each runtime (medians over rounds), their ratio, the largest batch and, on CUDA, the most memory.

    Runtimes of a model take turns within a cell, so their ratio is of the same minutes; models are measured one after
    the other, and compare by it, or on a machine that does nothing else.
    """

    class Config(EvalConfig):
        documents: int = Field(default=8192, ge=1, description="of each case")
        lengths: list[Lengths] = Field(default=[_SHORT, _LONG], min_length=1, description="each fixed, and drawn")
        kinds: list[Literal["fixed", "variable"]] = Field(
            default=["fixed", "variable"], min_length=1, description="which cases"
        )
        runtimes: list[Runtime] = Field(
            default=["flexbert", "transformers"],
            min_length=1,
            description="unpadded; padded to the longest of the batch",
        )
        rounds: int = Field(
            default=10, ge=1, description="over all documents, by turns of the runtimes, after one batch each"
        )
        seed: int = Field(default=42, ge=0, description="of lengths and tokens")
        batch_tokens: int = Field(
            default=8192, ge=1, description="on a CPU: slots of a batch, since memory there has no clear end"
        )
        max_batch: int = Field(default=2048, ge=1, description="documents of a batch at most")
        precision: Literal["auto", "fp32", "bf16"] = Field(
            default="auto", description="of the weights; auto: bf16 on a GPU"
        )
        attention: str | None = Field(
            default=None, description="transformers' attn_implementation; default: what it takes by itself"
        )

        @model_validator(mode="after")
        def _check(self) -> Any:
            distinct("kinds", self.kinds)
            distinct("runtimes", self.runtimes)
            distinct("lengths: longest", [each.longest for each in self.lengths])
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision_of(config.precision)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        """One for each kind and length that the model takes; all in one group: at once they would slow one another."""
        most = longest(model.folder, load_tokenizer(model.folder))
        names = ("documents", "runtimes", "rounds", "seed", "batch_tokens", "max_batch", "attention")
        settings = {
            **self.config.model_dump(include=set(names)),
            "precision": self.precision,
            "device": _machine(self.device),
            "versions": {name: version(name) for name in ("torch", "transformers")},  # others have other speeds
        }
        return [
            Cell(f"{kind}-{each.longest}", {**settings, "lengths": each.model_dump(), "kind": kind})
            for each in self.config.lengths
            for kind in self.config.kinds
            if each.longest <= most
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        """Raises RunError where not even one document fits."""
        lengths, kind = Lengths(**cell.settings["lengths"]), cell.settings["kind"]
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        encoders = {
            name: Encoder(model.folder, name, self.device, dtype, self.config.attention)
            for name in self.config.runtimes
            if known(model.folder) or name != "flexbert"
        }
        if not encoders:
            raise RunError(f"runtimes: flexbert does not know {model_type(model.folder)!r}: add transformers")
        first = next(iter(encoders.values()))
        documents = make_documents(
            lengths if kind == "variable" else Lengths(longest=lengths.longest, mean=lengths.longest, deviation=0),
            self.config.documents,
            first.vocab_size,
            {encoder.padding_id for encoder in encoders.values()},
            self.config.seed,
        )
        found: dict[str, dict[str, Any]] = {}
        for name, encoder in encoders.items():
            with encoder:
                batch = self._batch(encoder, documents[0].new_full((lengths.longest,), int(documents[0][0])))
                if not batch:
                    raise RunError(f"{cell.name}: {name}: not even one document of {lengths.longest} tokens fits")
                found[name] = {"batch": batch, "attention": encoder.attention, "seconds": []}
                encoder.seconds(encoder.inputs(documents[:batch]))
        for number in range(self.config.rounds):
            order = list(encoders)[:: 1 if number % 2 == 0 else -1]  # each is first as often as the other
            for name in order:
                self._round(encoders[name], documents, found[name])
        tokens = sum(len(ids) for ids in documents)
        for each in found.values():
            each["tokens/s"] = tokens / statistics.median(each["seconds"])
        return {"runtimes": found, "tokens": tokens, "documents": len(documents)}

    def _batch(self, encoder: Encoder, document: torch.Tensor) -> int:
        if self.device.type == "cuda":
            return largest_batch(fits_on_gpu(encoder, document), self.config.max_batch)
        return min(self.config.max_batch, max(1, self.config.batch_tokens // len(document)))

    def _round(self, encoder: Encoder, documents: list[torch.Tensor], found: dict[str, Any]) -> None:
        with encoder:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            batch, seconds = found["batch"], 0.0
            for start in range(0, len(documents), batch):
                seconds += encoder.seconds(encoder.inputs(documents[start : start + batch]))
            found["seconds"].append(seconds)
            if self.device.type == "cuda":
                found["GiB"] = max(found.get("GiB", 0.0), torch.cuda.max_memory_allocated(self.device) / 2**30)

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        found: dict[str, Any] = {}
        for each in self.config.lengths:
            for kind in self.config.kinds:
                cell = results.get(f"{kind}-{each.longest}")
                if cell is None:
                    found[f"{kind} {each.longest}"] = LONGER
                    continue
                found |= _columns(f"{kind} {each.longest}", cell["runtimes"])
        return found


def _columns(name: str, runtimes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for runtime, result in runtimes.items():
        found[f"{name} {runtime} tokens/s"] = round(result["tokens/s"])
        found[f"{name} {runtime} batch"] = result["batch"]
        if "GiB" in result:
            found[f"{name} {runtime} GiB"] = result["GiB"]
    if len(runtimes) == 2:
        found[f"{name} ratio"] = runtimes["flexbert"]["tokens/s"] / runtimes["transformers"]["tokens/s"]
    return found


def make_documents(lengths: Lengths, count: int, vocab_size: int, avoided: set[int], seed: int) -> list[torch.Tensor]:
    """Random ids (int64, on the CPU) of `count` documents, the same for the same arguments. avoided: ids that are in
    none, such as the padding's."""
    generator = keyed_generator(seed, "efficiency", lengths.longest)
    drawn = np.rint(generator.normal(lengths.mean, lengths.deviation, count)).astype(np.int64)
    allowed = np.setdiff1d(np.arange(vocab_size), list(avoided))
    sizes = drawn.clip(1, lengths.longest).tolist()
    return [torch.from_numpy(allowed[generator.integers(0, len(allowed), size)]) for size in sizes]


def _machine(device: torch.device) -> str:
    """What results are of: another machine measures anew."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.node()}, {torch.get_num_threads()} threads"
