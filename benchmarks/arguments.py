"""What the benchmarks' command lines share: an argument is used, or refused by name with exit code 2."""

import argparse
from collections.abc import Callable, Collection
from typing import Any


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """With the module's docstring, as it is, for --help; long options are not abbreviated."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def names_of(valid: Collection[str]) -> Callable[[str], list[str]]:
    """A type for argparse: names separated by commas, each of `valid`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in valid:
                raise argparse.ArgumentTypeError(f"unknown {name!r}, valid names: {', '.join(valid)}")
        return names

    return parse


def count(text: str) -> int:
    """A type for argparse: 1 or more."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number, 1 or more, got {text!r}")
    return number


def override(text: str) -> str:
    """A type for argparse: KEY=VALUE."""
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


def refuse(parser: argparse.ArgumentParser, given: argparse.Namespace, mode: str, *names: str) -> None:
    """End with exit code 2 when options were given that `mode` does not look at. Their default must be None."""
    for name in names:
        if getattr(given, name) is not None:
            parser.error(f"--{name.replace('_', '-')}: {mode} does not look at it: leave it out")


def with_defaults(given: argparse.Namespace, **defaults: Any) -> argparse.Namespace:
    """Options that were not given."""
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given
