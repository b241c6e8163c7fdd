"""Our encoder against `transformers` on this machine's CPU: training, inference, memory, share of the GEMM rate.

`python -m benchmarks.encoder [--peer transformers] [--rounds 7] [--only PART,...] [--limit 10]` prints JSON lines.
Both sides hold the same weights, see the same tokens and the same masks, and run by turns, each in a process of its
own, so that noise of the machine meets both; figures are medians over the rounds. The peer is used as its
documentation says: attention
`sdpa`, `sparse_prediction` (ModernBERT: scores of masked tokens only), batches padded to their longest document. Ours
runs as in `main.py train`, which keeps freed memory in the process (training/allocator.py); `peer_kept` is the peer
with that setting, too: the ratio to it is what is left of ours when the peer's user knows and does the same. Training
is forward, backward and an AdamW step (torch's fused one, both sides); bf16 is autocast with float32 weights, both
sides. Real tokens are counted, never padding. A peer that needs more than LIMIT times as long as ours for a turn is
stopped, and its figures are bounds (`at_most`, `at_least`): so it is with torch's bfloat16 on CPUs that have no such
products.

`--profile` prints where our time goes instead, and what it would be if only products and attention's kernel took any.
"""

import argparse
import ctypes
import gc
import itertools
import json
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flexbert
from benchmarks.arguments import count, names_of, parser_of, refuse, with_defaults
from benchmarks.encoder_sides import (
    CASES,
    DTYPES,
    MASKED,
    MODELS,
    WHO,
    Batch,
    Side,
    gemm_call,
    modernbert_peer,
    our_inference,
    our_training,
    ours_of,
    peer_inference,
    peer_training,
)
from flexbert.accounting import flops_per_token
from training.allocator import keep_freed_memory

PARTS = ("modernbert", "bert-base", "memory")


def serve(who: str, name: str, dtype: torch.dtype | None) -> None:
    """One side in this process: a JSON line [case, task, folder] on stdin, what it took on stdout, till stdin ends."""
    if who != "peer":
        keep_freed_memory()
    torch.manual_seed(0)
    peer = MODELS[name]()
    if who == "ours":
        side = Side(ours_of(peer), dtype, our_training, our_inference)
        del peer
    else:
        side = Side(peer, dtype, peer_training, peer_inference)
    batches: dict[str, Batch] = {}
    gemm, gemm_flops = gemm_call(dtype)
    tasks = {"training": side.step, "inference": side.infer, "gemm": lambda _: gemm()}
    print("ready", flush=True)
    for line in sys.stdin:
        case, task, folder = json.loads(line)
        if case not in batches:
            batches = {case: CASES[name][case]()}
        batch = batches[case]
        answer: dict[str, Any] = {"tokens": batch.tokens}
        if task == "states":
            answer["file"] = f"{folder}/{who}.npy"
            np.save(answer["file"], side.infer(batch).float().numpy())
        elif task == "work":
            lengths = batch.packed["cu_seqlens"].diff().tolist()
            answer["padded_tokens"] = batch.padded["input_ids"].numel()
            answer["flops"] = sum(flops_per_token(side.model.config, length, MASKED) * length for length in lengths)
        else:
            start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            tasks[task](batch)
            answer["seconds"] = time.perf_counter() - start
            answer["system_seconds"] = resource.getrusage(resource.RUSAGE_SELF).ru_stime - used.ru_stime
            answer["flops"] = gemm_flops
        print(json.dumps(answer), flush=True)


class Process:
    """A side in a process of its own."""

    def __init__(self, who: str, name: str, dtype: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.encoder", "--serve", who, "--model", name, "--dtype", dtype]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()  # that it is ready: no turn includes the imports

    def ask(self, case: str, task: str, limit: float | None = None, folder: str = "") -> dict[str, Any] | None:
        """None, and a fresh process, when the answer took longer than `limit` seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([case, task, folder]), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
            self.close()
            self._start()
            return None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"benchmarks.encoder: a side died in {case}, {task}: exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of one that was killed
            self.process.stdin.close()
        self.process.wait()


def compare(name: str, labels: list[str], cases: list[str], rounds: int, limit: float) -> None:
    """Print a line for each dtype, case and task."""
    for label in labels:
        processes = {who: Process(who, name, label) for who in WHO}
        try:
            # Before any training: sides that took another number of steps are different models.
            differences = {case: _difference(processes, case, limit) for case in cases}
            for case in cases:
                for task in ("training", "inference"):
                    line = _case(processes, case, task, rounds, limit)
                    line["mean_relative_difference_of_states"] = differences[case]
                    print(json.dumps({"model": name, "dtype": label, "case": case, "task": task, **line}), flush=True)
        finally:
            for process in processes.values():
                process.close()


def _difference(processes: dict[str, Process], case: str, limit: float) -> float | None:
    """Of both sides' hidden states; None when the peer took too long."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        answers = [processes["ours"].ask(case, "states", folder=folder)]
        answers.append(processes["peer"].ask(case, "states", limit * (time.perf_counter() - start), folder))
        if None in answers:
            return None
        ours, peer = (np.load(answer["file"]) for answer in answers if answer)
    return float(f"{np.abs(ours - peer).mean() / np.abs(peer).mean():.1e}")


_SECONDS, _MOST = 12.0, 9  # of ours in one of ROUNDS; turns in it


def _case(processes: dict[str, Process], case: str, task: str, rounds: int, limit: float) -> dict[str, Any]:
    """By turns, after one round to warm up; more rounds where ours takes a few seconds only, since the median of few
    short turns says as much of the machine as of the sides. A peer is slow when it took more than `limit` times as long
    as ours in the first; then the other one is not tried."""
    took: dict[str, list[dict[str, Any]]] = {who: [] for who in (*processes, "gemm")}
    slow: dict[str, float] = {}
    ours = processes["ours"].ask(case, task)
    assert ours is not None
    allowed = limit * ours["seconds"]
    count = rounds * min(max(round(_SECONDS / ours["seconds"]), 1), _MOST)
    for number in range(count + 1):
        for who in (*processes, "gemm"):
            process, what = (processes["ours"], "gemm") if who == "gemm" else (processes[who], task)
            if who in slow or (who == "peer_kept" and "peer" in slow):
                continue
            answer = process.ask(case, what, allowed if who in ("peer", "peer_kept") else None)
            if answer is None and number:  # the machine stalled, or this peer is near the limit: the turn counts as it
                process.ask(case, what, allowed)  # and the new process warms up
                answer = {"seconds": allowed, "system_seconds": 0.0}
            if answer is None:
                slow[who] = allowed
            elif number:
                took[who].append(answer)
    seconds = {who: [answer["seconds"] for answer in answers] for who, answers in took.items() if answers}
    median = {who: statistics.median(found) for who, found in seconds.items()} | slow
    slow |= {who: allowed for who in ("peer", "peer_kept") if median.get(who, 0.0) >= allowed}
    work = processes["ours"].ask(case, "work")
    assert work is not None
    tokens = work["tokens"]
    line: dict[str, Any] = {
        f"{who}_tokens_per_second{'_at_most' if who in slow else ''}": round(tokens / median[who])
        for who in processes
        if who in median
    }
    for peer, key in (("peer", "ratio"), ("peer_kept", "ratio_to_peer_kept")):
        if peer in median:
            line[key + ("_at_least" if peer in slow else "")] = round(median[peer] / median["ours"], 2)
    if task == "training":
        line["peer_slots_per_token"] = round(work["padded_tokens"] / tokens, 2)
        gemm_rate = took["gemm"][0]["flops"] / median["gemm"]
        line["gemm_gflops"] = round(gemm_rate / 1e9)
        line["share_of_gemm_rate"] = round(work["flops"] / median["ours"] / gemm_rate, 3)
        for who in processes.keys() & seconds.keys() - slow.keys():
            line[f"{who}_system_seconds"] = round(statistics.median(each["system_seconds"] for each in took[who]), 2)
    return line


def compare_memory(labels: list[str]) -> None:
    """Peak memory that a training step at 8192 tokens adds to a process that has made its imports."""
    for label in labels:
        found = {}
        for who in ("ours", "peer"):
            command = [sys.executable, "-m", "benchmarks.encoder", "--memory-of", who, "--dtype", label]
            found[who] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            json.dumps(
                {
                    "model": "modernbert",
                    "dtype": label,
                    "case": "1 x 8192",
                    "task": "peak memory of a training step",
                    "ours_mb": found["ours"] >> 20,
                    "peer_mb": found["peer"] >> 20,
                    "ratio": round(found["ours"] / found["peer"], 2),
                }
            ),
            flush=True,
        )


def memory_of(who: str, dtype: torch.dtype | None) -> int:
    """Bytes: weights, gradients, activations and temporary memory of one step without the optimizer."""
    peer = modernbert_peer()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model: Any = flexbert.from_hf(folder) if who == "ours" else type(peer).from_pretrained(folder)
    del peer
    batch = Batch([8192], 50368, 0)
    for parameter in model.parameters():  # the peer's are in a file that is mapped, and not yet read
        parameter.data = parameter.data.clone()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed, and the step would take first
    before = _resident()
    if who == "ours":
        keep_freed_memory()
    autocast = nullcontext if dtype is None else lambda: torch.autocast("cpu", dtype=dtype)
    (our_training if who == "ours" else peer_training)(model.train(), batch, autocast)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before + weights


KINDS = {
    "products": ("flexbert::onednn_linear", "mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": tuple(f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward")),
    "softmax of the loss": ("aten::_softmax", "aten::softmax", "aten::amax", "aten::sum"),
    "optimizer": ("aten::_fused_adamw_",),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::index_select"),
}


def profile(steps: int, labels: list[str]) -> None:
    """Print shares of our time by kind of operator, with the optimizer where `training` has it, and how fast ours would
    be if nothing but products and attention's kernel took any."""
    keep_freed_memory()
    for label in labels:
        torch.manual_seed(0)
        side = Side(ours_of(modernbert_peer()), DTYPES[label], our_training, our_inference)
        gemm, gemm_flops = gemm_call(DTYPES[label])
        for case, task in itertools.product(("4 x 1024", "1 x 8192"), ("training", "inference")):
            batch, act = CASES["modernbert"][case](), side.step if task == "training" else side.infer
            act(batch)
            gemm()
            rates = []
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                for _ in range(steps):
                    act(batch)
            for _ in range(10 * steps):
                start = time.perf_counter()
                gemm()
                rates.append(gemm_flops / (time.perf_counter() - start))
            spent = {event.key: event.self_cpu_time_total / 1e6 / steps for event in profiler.key_averages()}
            total = sum(spent.values())
            kinds = {kind: sum(spent.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
            kinds["everything else"] = total - sum(kinds.values())
            line = {
                "tokens_per_second": round(batch.tokens / total),
                "of_products_and_attention_alone": round(batch.tokens / (kinds["products"] + kinds["attention"])),
                "shares": {kind: round(seconds / total, 3) for kind, seconds in kinds.items()},
                "gflops_of_square_product": round(statistics.median(rates) / 1e9),
            }
            if task == "training":
                # A sequence of one token has next to no attention: what is left is products.
                flops = flops_per_token(side.model.config, 1, MASKED) * batch.tokens
                line["gflops_of_products"] = round(flops / kinds["products"] / 1e9)
            print(json.dumps({"model": "modernbert", "dtype": label, "case": case, "task": task, **line}), flush=True)


def _resident() -> int:
    fields = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in fields.splitlines() if line.startswith("VmRSS"))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--peer", choices=["transformers"], default="transformers")
    parser.add_argument(
        "--rounds",
        type=count,
        help="of each case, default 7; up to nine times as many of short ones; with --profile steps",
    )
    parser.add_argument("--limit", type=float, help="times as long as ours that a peer may take, default 10")
    parser.add_argument("--only", type=names_of(PARTS), help="parts, separated by commas; default: all")
    every = list(dict.fromkeys(case for cases in CASES.values() for case in cases))
    parser.add_argument("--cases", type=names_of(every), help="of the models, separated by commas; default: all")
    parser.add_argument("--dtypes", type=names_of(DTYPES), help="separated by commas; default: all")
    parser.add_argument("--profile", action="store_true", help="of ours, instead")
    parser.add_argument("--serve", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, DTYPES[arguments.dtype]))
        return
    if arguments.serve:
        serve(arguments.serve, arguments.model, DTYPES[arguments.dtype])
        return
    if arguments.profile:
        refuse(parser, arguments, "--profile", "only", "cases", "limit")
    elif arguments.only == ["memory"]:
        refuse(parser, arguments, "--only memory", "cases", "rounds", "limit")
    with_defaults(arguments, rounds=7, limit=10.0, only=list(PARTS), dtypes=list(DTYPES))
    if arguments.profile:
        profile(arguments.rounds, arguments.dtypes)
        return
    chosen = {
        name: [case for case in CASES[name] if arguments.cases is None or case in arguments.cases]
        for name in MODELS
        if name in arguments.only
    }
    known = {case for name in chosen for case in CASES[name]}
    for case in arguments.cases or ():
        if case not in known:
            parser.error(f"--cases: {case!r} is no case of --only {','.join(arguments.only)}")
    for name, cases in chosen.items():
        if cases:
            compare(name, arguments.dtypes, cases, arguments.rounds, arguments.limit)
    if "memory" in arguments.only:
        compare_memory(arguments.dtypes)


if __name__ == "__main__":
    main()
