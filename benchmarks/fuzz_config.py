"""Config fuzzing: `python -m benchmarks.fuzz_config [COUNT]` (default 10,000) breaks run files and dry-runs them.

Each case is a run file of configs/ with one to three mutations, taken through what `train --dry-run` does. Counted as
failures: anything raised but ConfigError; a line of its message that does not begin with the file, or, where the file
is fine but data or starting weights are not there, with the key; a file that is accepted though it holds a key that the
run does not know; a case that takes 30 s. Every case follows from its number and the seed. Prints a JSON line; exit
code 1 for failures.
"""

import io
import json
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.arguments import count, parser_of
from commands.dry_run import dry_run
from data.keyed import torch_seed
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config

ROOT = Path(__file__).parent.parent
SECONDS = 30  # in which every case must be done; most take 10 ms
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, -0.0, 0.5, 1e-300, -3.7, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "1e9", "50B", "-1M", "1.719T", "1e999", "nan", "null", "yes", "~", "12e", "NaNT", "0x10", "1_000"),
    *("ümläut", "日本語", "\u202e", "a\nb", "\x00", "\ud7ff", "💥" * 40, "../..", "/", "C:\\", "x" * 5000),
    *("${seed}", "${nowhere}", "${", "}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${name}${name}", "???", "${.}"),
    *("${phases[0].tokens}", "${model}", "${oc.nothing:1}", "${a:b:c}", "\\${x}", "${..a}", "*", "&a", "!!python/x:os"),
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    *("[", "{", "}", "- ", ": ", "\t", '"', "'", "|", ">", "%", "@", "`", "!!", "? ", "---\n", "...\n", "#", "&a "),
    *("\x00", "\u2028", "﻿", "!!python/name:os.system", "!!binary x", "!!set {a, b}", "<<: *a", "2001-01-01"),
    *("*a", "0o17", "1:30", "a: &a [*a]", "a: &a {b: *a}", "\n  x: 1", "\n x: 1\n   y", "name: again\n"),
    *("\nseed: 1\nseed: 2\n", "\nx: &x [1, 2]\ny: [*x, *x]\n"),
)  # fmt: skip


def run_files() -> list[Path]:
    """The run files that the project comes with."""
    return [ROOT / "configs" / "demo.yaml", *sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))]


@dataclass
class Result:
    """What became of the cases. failures: (case, mutations, what happened) of those that went wrong."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    mutations: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, list[str], str]] = field(default_factory=list)


def fuzz(
    count: int, seed: int, load: Callable[[Path], RunConfig] = load_run_config, files: list[Path] | None = None
) -> Result:
    """Load `count` mutated run files. load: what is tested."""
    signal.signal(signal.SIGALRM, _too_slow)
    sources = [path.read_text() for path in files or run_files()]
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        for case in range(count):
            rng = random.Random(torch_seed(seed, "fuzz", case))
            text, mutations = _mutate(rng, rng.choice(sources))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            result.cases += 1
            result.mutations.update(mutations)
            signal.alarm(SECONDS)
            try:
                config = load(path)
                result.accepted += 1
                problem = _unknown_key_of(path, config) or _dry_run(config)
            except ConfigError as error:
                result.refused += 1
                problem = _bad_message(str(error), str(path))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                problem = f"{type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"
            finally:
                signal.alarm(0)
            if problem is not None:
                result.failures.append((case, mutations, problem))
    return result


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"took over {SECONDS} seconds")


def _unknown_key_of(path: Path, config: RunConfig) -> str | None:
    """The first key of the file that the accepted config does not hold."""
    node: Any = OmegaConf.to_container(OmegaConf.load(path))
    node.pop("defaults", None)
    if isinstance(node.get("model"), dict):
        node["model"].pop("preset", None)
    unknown = _unknown(node, config.model_dump(mode="json", by_alias=True), "")
    return f"accepted with the unknown key {unknown!r}" if unknown else None


def _dry_run(config: RunConfig) -> str | None:
    try:
        dry_run(config, Console(file=io.StringIO()))
    except ConfigError as error:
        return _bad_message(str(error), r"(data|from|init|model|phases|evaluation|optimizer)\b")
    return None


def _unknown(node: Any, known: Any, where: str) -> str | None:
    """The first key of a file's node that is not in the config's node."""
    if isinstance(node, dict) and isinstance(known, dict):
        for key, value in node.items():
            if str(key) not in known:
                return f"{where}{key}"
            if (found := _unknown(value, known[str(key)], f"{where}{key}.")) is not None:
                return found
    elif isinstance(node, list) and isinstance(known, list):
        for number, (left, right) in enumerate(zip(node, known, strict=True)):
            if (found := _unknown(left, right, f"{where}{number}.")) is not None:
                return found
    elif isinstance(node, dict) and node:
        return f"{where}{next(iter(node))}"
    return None


def _bad_message(message: str, start: str) -> str | None:
    lines = message.splitlines()
    if not lines or not all(re.match(rf"{start}.*: .", line) for line in lines):
        return f"message: {message[:300]!r}"
    if any(len(line) > 2000 for line in lines):
        return f"message of {max(map(len, lines))} characters: {message[:300]!r}"
    return None


def _mutate(rng: random.Random, text: str) -> tuple[str, list[str]]:
    """The text of a broken file, and what was done to it."""
    if rng.random() < 0.25:
        done = rng.choice([_insert_text, _delete_text, _duplicate_line, _shuffle_indent, _flip_byte])
        return done(rng, text), [done.__name__.strip("_")]
    node, names = yaml.safe_load(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(_CHANGES)
        change(rng, node)
        names.append(change.__name__.strip("_"))
    return yaml.dump(node, allow_unicode=True, sort_keys=False), names


def _places(node: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of every value below a node."""
    found = [] if found is None else found
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        found.append((node, key))
        if len(found) < 2000:
            _places(value, found)
    return found


def _some_place(rng: random.Random, node: Any) -> tuple[Any, Any]:
    places = _places(node)
    return rng.choice(places) if places else ({"": node}, "")


def _replace_by_scalar(rng: random.Random, node: Any) -> None:
    place, key = _some_place(rng, node)
    place[key] = rng.choice(SCALARS)


def _replace_by_container(rng: random.Random, node: Any) -> None:
    place, key = _some_place(rng, node)
    value = place[key]
    place[key] = rng.choice(
        [[], {}, [value], {"name": value}, {str(key): value}, [[value]], [value, value], {0: value}]
    )


def _delete_key(rng: random.Random, node: Any) -> None:
    place, key = _some_place(rng, node)
    del place[key]


def _unknown_key(rng: random.Random, node: Any) -> None:
    maps = [node, *(place[key] for place, key in _places(node) if isinstance(place[key], dict))]
    place = rng.choice(maps)
    near = str(rng.choice(list(place) or ["name"]))
    near = near[:-1] + rng.choice("xyz_ ") if rng.random() < 0.5 else rng.choice(["zz_new", "Name", "", "a.b", "ключ"])
    place[rng.choice([near, near, near, 1, True, 2.5, None])] = rng.choice([*SCALARS[:8], {}, [], {"a": {"b": 1}}])


def _misspell_key(rng: random.Random, node: Any) -> None:
    place, key = _some_place(rng, node)
    if isinstance(place, dict) and isinstance(key, str) and key:
        at = rng.randrange(len(key))
        place[key[:at] + rng.choice("abcxyz_") + key[at + 1 :]] = place.pop(key)


def _swap_values(rng: random.Random, node: Any) -> None:
    (first, one), (second, two) = _some_place(rng, node), _some_place(rng, node)
    copy = json.loads(json.dumps([first[one], second[two]], default=str))
    first[one], second[two] = copy[1], copy[0]


def _scale_number(rng: random.Random, node: Any) -> None:
    numbers = [(place, key) for place, key in _places(node) if isinstance(place[key], int | float)]
    if numbers:
        place, key = rng.choice(numbers)
        place[key] = place[key] * rng.choice((-1, 0, 0.1, 1.5, 10, 1000, 10**6, 10**12, 10**25))


def _nest_deeply(rng: random.Random, node: Any) -> None:
    place, key = _some_place(rng, node)
    value: Any = place[key] if not isinstance(place[key], dict | list) else 1
    for _ in range(rng.choice((3, 30, 90))):
        value = {"a": value} if rng.random() < 0.5 else [value]
    place[key] = value


def _repeat_value(rng: random.Random, node: Any) -> None:
    lists = [place[key] for place, key in _places(node) if isinstance(place[key], list) and place[key]]
    if lists:
        chosen = rng.choice(lists)
        chosen.append(json.loads(json.dumps(rng.choice(chosen), default=str)))


def _add_defaults(rng: random.Random, node: Any) -> None:
    if isinstance(node, dict):
        node["defaults"] = rng.choice(
            ["nowhere.yaml", ["run.yaml"], 3, None, {}, [None], [["a"]], "..", "", "\x00", [{"a": 1}], [], "x" * 300]
        )


def _point_at_preset(rng: random.Random, node: Any) -> None:
    if isinstance(node, dict):
        node["model"] = rng.choice(
            [{"preset": value} for value in (None, 3, [], {}, "", "bert-base", "../demo", True)]
            + ["bert-base", "x", "", {"preset": "bert-base", "norm": {"name": "layernorm", "epz": 1}}, ["bert-base"]]
        )


_CHANGES = (
    *(_replace_by_scalar, _replace_by_scalar, _replace_by_scalar, _replace_by_container, _delete_key, _unknown_key),
    *(_unknown_key, _misspell_key, _swap_values, _scale_number, _nest_deeply, _repeat_value, _add_defaults),
    _point_at_preset,
)


def _insert_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(TEXTS) + text[at:]


def _delete_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] + text[at + rng.choice((1, 3, 20, 10**6)) :]


def _duplicate_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "".join(lines)


def _shuffle_indent(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((" ", "    ", "\t", "- ")) + lines[at]
    return "".join(lines)


def _flip_byte(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] + chr(rng.choice((0, 7, 27, 0x7F, 0x85, 0xFFFE, 0x1F600, rng.randrange(32, 127)))) + text[at + 1 :]


def main(count: int) -> int:
    start, result = time.monotonic(), fuzz(count, seed=17)
    for case, mutations, problem in result.failures[:20]:
        print(f"case {case} ({', '.join(mutations)}): {problem}", file=sys.stderr)
    line = {
        "cases": result.cases,
        "files": len(run_files()),
        "refused": result.refused,
        "accepted": result.accepted,
        "failures": len(result.failures),
        "mutations": dict(result.mutations.most_common()),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(line))
    return 1 if result.failures else 0


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("count", type=count, nargs="?", default=10_000, metavar="COUNT")
    sys.exit(main(parser.parse_args().count))
