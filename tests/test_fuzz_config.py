"""Broken run files: one line each, never a traceback, never a run with an unknown key."""

from pathlib import Path

import pytest

from benchmarks.fuzz_config import fuzz, run_files
from flexbert_core.composing import load_node
from flexbert_core.schema import ConfigError, validate
from recipe.config import RunConfig, expand_preset, load_run_config


def test_broken_run_files_are_refused_with_one_line() -> None:
    result = fuzz(250, seed=3)
    assert result.failures == []
    assert result.cases == 250 == result.refused + result.accepted
    assert result.accepted > 10  # files that still are right, and whose keys were compared
    assert len(result.mutations) > 15


def test_the_files_as_they_are_load() -> None:
    assert len(run_files()) > 1
    for path in run_files():
        load_run_config(path)


@pytest.mark.slow
def test_faults_are_seen() -> None:
    def careless(path: Path) -> RunConfig:
        """Drops what it does not know."""
        node = load_node(path, (), expand_preset)
        known = {field.alias or name for name, field in RunConfig.model_fields.items()}
        return validate(RunConfig, {key: value for key, value in node.items() if key in known}, path)

    def rude(path: Path) -> RunConfig:
        try:
            return load_run_config(path)
        except ConfigError as error:
            raise KeyError(str(error)) from None

    def vague(path: Path) -> RunConfig:
        try:
            return load_run_config(path)
        except ConfigError:
            raise ConfigError("the config is wrong") from None

    for load, word in ((careless, "unknown key"), (rude, "KeyError"), (vague, "message: 'the config is wrong'")):
        result = fuzz(150, seed=3, load=load, files=run_files()[:1])
        assert result.failures
        assert any(word in problem for _, _, problem in result.failures), result.failures


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &a [*a]\n", "not valid yaml: yaml recursive aliases"),
        ("defaults: 3\n", "defaults: expected a file or a list of files, got 3"),
        ("defaults: [null]\n", "defaults: expected a file or a list of files"),
        ('defaults: "\\0"\n', "null"),
        (f"defaults: {'x' * 300}\n", "defaults: expected a path of names of at most 255 bytes"),
        ("seed: ${\n", "seed: "),
        ("seed: " + "[" * 200 + "]" * 200 + "\n", "sections lie too deep in each other"),
        ('seed: "\\u202e\\u2028\\x07"\n', "seed: should be a valid integer, got '\\u202e\\u2028\\x07'"),
        (f"seed: {'x' * 9000}\n", " ... "),
        ('runs: "a\\nb"\n', "runs: expected one line of characters that can be printed, got 'a\\nb'"),
        (f"checkpoint: {{interval: 1{'0' * 400}}}\n", "checkpoint.interval: expected a count under 2^63"),
    ],
)
def test_what_the_fuzzer_found(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    assert any(
        (part.startswith(f"{file}") and line in part.lower()) or line in part for part in str(caught.value).splitlines()
    )
    assert all(part.startswith(str(tmp_path)) and len(part) < 2100 for part in str(caught.value).split("\n"))
