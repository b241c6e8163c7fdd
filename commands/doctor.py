"""`main.py doctor`: whether this machine can train, and what to do where it cannot."""

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from commands.sizes import already_there, disk_need
from data.feed.loader import check_tokenizer, open_streams
from data.store.shards import Stream
from data.store.transfer import TransferError, is_url
from flexbert import FlexBertConfig
from flexbert.parity import BACKENDS, disagreement
from flexbert_core.schema import ConfigError, RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.branching import read_origin
from training.checkpoints.files import list_checkpoints
from training.checkpoints.remote import RemoteCheckpoints
from training.vocabulary import check_vocabulary

ROOT = Path(__file__).parent.parent
# Of environments of their own, beside .venv.
_ELSEWHERE = ("requirements-docs.txt", "requirements-next.txt")
_GB = 10**9
_BACKEND = "model.attention.backend"
_STYLES = {"ok": "green", "-": "", "warn": "yellow", "FAIL": "bold red"}
# A rank holds about 1 GB after its imports, and its loader workers share it.
_LEAST_MEMORY, _LEAST_DISK, _LEAST_SHARED = 4 * _GB, 5 * _GB, 1 * _GB


@dataclass(frozen=True)
class Check:
    """One line of the table. fix: what to do.

    ok: fine; -: does not apply; warn: training works, but look at it; FAIL: exit code 1.
    """

    name: str
    state: Literal["ok", "-", "warn", "FAIL"]
    found: str
    fix: str = ""


def doctor(config: RunConfig | None, console: Console) -> bool:
    """Check this machine, and what a run file needs of it; print a table. Returns whether nothing failed."""
    groups: list[Callable[[], Iterator[Check]]] = [_machine, _versions, _devices, lambda: _attention(config)]
    groups += [_shared_memory, lambda: _disk(config), lambda: _remote(config), lambda: _data(config)]
    table = Table("check", "state", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    failed = 0
    for group in groups:
        for check in group():
            state = Text(check.state, _STYLES[check.state])
            table.add_row(check.name, state, Text(check.found), Text(check.fix))
            failed += check.state == "FAIL"
    console.print(table)
    console.print(f"{failed} of the checks failed" if failed else "nothing stands against training here")
    return not failed


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    fix = "give the process two cores: one trains, one loads" if cores < 2 else ""
    yield Check("cores", "warn" if cores < 2 else "ok", f"{cores} ({platform.machine()})", fix)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_memory()
    usable = min(memory, limit or memory)
    found = f"{usable / 2**30:.1f} GiB" + (
        f" (a limit; the machine has {memory / 2**30:.1f})" if usable < memory else ""
    )
    low = usable < _LEAST_MEMORY
    yield Check("memory", "warn" if low else "ok", found, "under 4 GB: train small models only" if low else "")
    system = platform.system()
    fix = "" if system == "Linux" else "FlexBERT is tested on Linux only"
    yield Check("system", "ok" if system == "Linux" else "warn", platform.platform(), fix)


def _cgroup_memory() -> int | None:
    """The limit of the container, if there is one (cgroup 2, else 1)."""
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return None


@dataclass(frozen=True)
class Stack:
    """A set of versions that the tests run with. pins: its requirements file; `make TARGET` installs it in FOLDER."""

    name: str
    pins: str
    pythons: tuple[str, ...]
    folder: str
    target: str


STACKS = (
    Stack("pinned", "requirements.txt", ("3.11",), ".venv", "setup"),
    Stack("next", "requirements-next.txt", ("3.12", "3.13"), ".venv-next", "setup-next"),
)


def stack_in_use() -> Stack:
    """The one that pins the installed torch; where none does, the first, whose pins then say what is wrong."""
    for stack in STACKS:
        pins = _pins(ROOT / stack.pins) if (ROOT / stack.pins).is_file() else ()
        if any(pin.name == "torch" and _fits(pin, found) for pin, found in pins):
            return stack
    return STACKS[0]


def _versions() -> Iterator[Check]:
    stack = stack_in_use()
    yield Check("stack", "ok", f"{stack.name} ({stack.pins}), torch {torch.__version__}")
    version = platform.python_version()
    good = version.rsplit(".", 1)[0] in stack.pythons
    fix = f"make {stack.folder} anew with Python {' or '.join(stack.pythons)}: make {stack.target}"
    yield Check("Python", "ok" if good else "FAIL", version, "" if good else fix)
    if stack.pins != STACKS[0].pins:  # a lock: it holds all that there is
        files = {ROOT / stack.pins}
    else:
        files = set(ROOT.glob("requirements*.txt")) - {ROOT / name for name in _ELSEWHERE}
    for file in sorted(files):
        pins = list(_pins(file))
        wrong = [
            f"{pin.name} {found or 'missing'}, not {pin.specifier}" for pin, found in pins if not _fits(pin, found)
        ]
        needed = file.name == stack.pins
        if not needed and not any(found for _, found in pins):
            yield Check(file.name, "-", "not installed (optional)")
        elif wrong:
            shown = "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            flag = "--no-build-isolation " if "gpu" in file.name else ""
            flag = "--no-deps " if stack.pins != STACKS[0].pins else flag
            fix = f"{ROOT / stack.folder / 'bin/pip'} install {flag}-r {file.name}"
            yield Check(file.name, "FAIL" if needed else "warn", shown, fix)
        else:
            yield Check(file.name, "ok", f"{len(pins)} packages as pinned")


def _pins(file: Path) -> Iterator[tuple[Requirement, str | None]]:
    """Every requirement of a file, and the installed version."""
    for line in file.read_text().splitlines():
        if re.match(r"[A-Za-z]", line):
            requirement = Requirement(line.split("#")[0].strip())
            try:
                yield requirement, metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                yield requirement, None


def _fits(pin: Requirement, version: str | None) -> bool:
    return version is not None and pin.specifier.contains(version, prereleases=True)


def _devices() -> Iterator[Check]:
    threads = f"CPU, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        hidden = Path("/proc/driver/nvidia/version").exists()
        fix = "the driver is there but torch sees no device: nvidia-smi, CUDA_VISIBLE_DEVICES" if hidden else ""
        yield Check("devices", "warn" if hidden else "ok", f"{threads}; no CUDA device", fix)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        try:
            value = torch.ones(64, 64, device=f"cuda:{index}") @ torch.ones(64, 64, device=f"cuda:{index}")
            works = bool((value == 64).all())
        except RuntimeError as error:
            yield Check(f"cuda:{index}", "FAIL", f"{found}: {str(error).splitlines()[0]}", "nvidia-smi; another driver")
            continue
        slow = not torch.cuda.is_bf16_supported(including_emulation=False)
        state = "FAIL" if not works else "warn" if slow else "ok"
        fix = "computes wrongly: take it out of use" if not works else "no bfloat16: it will be slow" if slow else ""
        yield Check(f"cuda:{index}", state, found, fix)


def _attention(config: RunConfig | None) -> Iterator[Check]:
    """Two layers, forward and backward, by each backend and by the eager reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = {} if config is None else _named_backends(config.model)
    for backend in BACKENDS:
        name = f"attention: {backend}"
        try:
            result = disagreement(backend, device)
        except ConfigError as error:
            why = str(error).split("cannot run: ")[-1].removesuffix(": use auto, or sdpa")
            fix = f"{named[backend]}: auto, or sdpa" if backend in named else ""
            yield Check(name, "FAIL" if fix else "-", why, fix)
            continue
        except Exception as error:  # whatever a kernel that was built for another machine raises
            text = (str(error).splitlines() or [""])[0]
            fix = f"{named.get(backend, _BACKEND)}: sdpa, or install what {backend} needs anew"
            yield Check(name, "FAIL", f"{type(error).__name__}: {text}", fix)
            continue
        good = result.error <= result.tolerance
        found = f"differs from eager by {result.error:.1e} ({result.dtype}, forward and backward)"
        fix = "" if good else f"over {result.tolerance:.0e}: do not train with it; {named.get(backend, _BACKEND)}: sdpa"
        yield Check(name, "ok" if good else "FAIL", found, fix)


def _named_backends(model: FlexBertConfig) -> dict[str, str]:
    """The backends that the layers' attentions name, and the key of each; those of the initial layers among them."""
    named = {}
    for index in range(model.num_hidden_layers):
        attention = model.layer(index).attention
        key = _BACKEND if attention is model.attention else "model.initial_layers.attention.backend"
        named.setdefault(getattr(attention, "backend", None), key)
    return named


def _shared_memory() -> Iterator[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Check("shared memory", "warn", "no /dev/shm", "several GPUs on one machine need it")
        return
    free = shutil.disk_usage(folder).free
    # NCCL moves data between the GPUs of a machine through it; the loader hands batches over by pipes.
    short = free < _LEAST_SHARED
    state = "ok" if not short else "FAIL" if torch.cuda.device_count() > 1 else "warn"
    fix = "docker run --shm-size=8g (or --ipc=host); only several GPUs on one machine need it" if short else ""
    yield Check("shared memory", state, f"/dev/shm: {free / _GB:.1f} GB free", fix)


def _disk(config: RunConfig | None) -> Iterator[Check]:
    folder = Path("runs") if config is None else config.folder
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".unfinished-doctor"):
            pass
        yield Check("run folder", "ok", f"{folder}: can be written")
    except OSError as error:
        fix = f"set runs: to a folder of yours, or chown {there}"
        yield Check("run folder", "FAIL", f"{folder}: {error.strerror}", fix)
        return
    free, needed, why = shutil.disk_usage(there).free, _LEAST_DISK, ""
    if config is not None:
        whole, there_now = disk_need(config, PhasePlan(config)).total, already_there(folder)
        needed = max(0, whole - there_now)
        why = f"; about {whole / _GB:,.1f} GB for checkpoints and exports"
        why += f", of which {there_now / _GB:,.1f} are there" if there_now else ""
    state = "ok" if free >= needed else "warn" if config is None else "FAIL"
    fix = "" if state == "ok" else "free some, set runs: to another disk, or keep fewer (checkpoint.keep_every, .keep)"
    yield Check("disk", state, f"{there}: {free / _GB:.1f} GB free{why}", fix)
    if config is not None and any(is_url(stream.path) for stream in config.data.streams.values()):
        yield _cache(config)


def _remote(config: RunConfig | None) -> Iterator[Check]:
    if config is not None and config.checkpoint.remote is not None:
        remote = RemoteCheckpoints(config)
        try:
            found = f"{remote.url}: can be written, holds {remote.probe()} checkpoints"
            yield Check("remote checkpoints", "ok", found)
        except TransferError as error:
            yield Check("remote checkpoints", "FAIL", str(error), "mend it, or leave checkpoint.remote out")


def _start(config: RunConfig, streams: list[Stream]) -> Iterator[Check]:
    """What a run that begins starts from, and whether its vocabulary is the streams'."""
    try:
        origin = read_origin(config)
        if origin is not None:
            yield Check("from", "ok", origin.record["from"])
        if streams:
            check_vocabulary(config, streams, origin and origin.rows)
    except (ConfigError, RunError) as error:
        for line in str(error).split("\n"):
            text, _, fix = line.rpartition(": ")
            yield Check("from" if line.startswith("from") else "vocabulary", "FAIL", text or fix, fix if text else "")


def _cache(config: RunConfig) -> Check:
    folder, limit = config.data.cache_folder, config.data.cache_limit
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    used = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    found = f"{folder}: {used / _GB:.1f} of {limit / _GB:.1f} GB used, {free / _GB:.1f} GB free on its disk"
    if not os.access(there, os.W_OK):
        return Check("shard cache", "FAIL", f"{folder}: cannot be written", "set data.cache")
    if free < limit - used:
        return Check("shard cache", "FAIL", found, "set data.cache_limit lower, or data.cache to another disk")
    return Check("shard cache", "ok", found)


def _data(config: RunConfig | None) -> Iterator[Check]:
    """Every stream and the tokenizer, as a run would open them, each by itself."""
    if config is None:
        yield Check("data", "-", "give a run file to check its streams, remote ones too")
        return
    opened = {}
    for name, stream in config.data.streams.items():
        one = config.data.model_copy(update={"streams": {name: stream}})
        start = time.monotonic()
        try:
            splits = [open_streams(one, split)[0] for split in ("train", "validation")]
        except (ConfigError, RunError) as error:
            text, _, fix = str(error).removeprefix(f"data.streams.{name}.path: ").rpartition(": ")
            yield Check(f"stream {name}", "FAIL", text or fix, fix if text else "")
            continue
        opened[name] = splits[0]
        where = f"remote, answered in {time.monotonic() - start:.1f} s" if is_url(stream.path) else "local"
        yield Check(f"stream {name}", "ok", f"{splits[0].manifest.tokens:,} tokens in {stream.path} ({where})")
    if opened:
        try:
            check_tokenizer(config.data, list(opened.values()))
            yield Check("tokenizer", "ok", config.data.tokenizer)
        except (ConfigError, RunError) as error:
            text, _, fix = str(error).rpartition(": ")
            yield Check("tokenizer", "FAIL", text, fix)
    if not list_checkpoints(config.folder / "checkpoints"):
        yield from _start(config, list(opened.values()))
    try:
        phases = PhasePlan(config).phases
        yield Check("phases", "ok", f"{len(phases)}, {phases[-1].end_step:,} steps")
    except ConfigError as error:
        yield Check("phases", "FAIL", str(error), "")
