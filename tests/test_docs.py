"""What the pages and the README say is what the code does: tables, links, and every block of YAML and Python."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from omegaconf import OmegaConf

from commands.reference import markdown
from data.feed.masking import MASKINGS
from data.preparation.config import load_prepare_config
from data.preparation.executors import EXECUTORS
from data.preparation.filters import FILTERS
from data.preparation.sources import SOURCES
from data.tokenizer import TOKENIZERS
from flexbert import FlexBertConfig
from flexbert.accounting import count_parameters
from flexbert.config import PRESETS
from flexbert.hf.convert import transformers_config
from flexbert.registry import ELSEWHERE, SLOTS
from flexbert_core.schema import Registry
from recipe.config import load_run_config
from recipe.schedules import SCHEDULES
from recipe.slots import EVALUATIONS, OBJECTIVES, OPTIMIZERS, PARALLELISMS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "reference.md"]  # which is generated
POSITIONS = {"learned": "learned", "alibi": "ALiBi", "sinusoidal": "sinusoids"}


def text_of(page: Path) -> str:
    """With its snippets in their places, as the site has it."""
    included = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
    return included.sub(lambda found: (ROOT / found[1]).read_text().rstrip("\n"), page.read_text())


def blocks(language: str) -> list[Any]:
    """(page, number, text) of each block of code in a language."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
        name = page.relative_to(ROOT).with_suffix("").as_posix()
        found += [pytest.param(text, id=f"{name}-{number}") for number, text in enumerate(texts)]
    return found


def preset_row(file: Path) -> str:
    config = FlexBertConfig.from_yaml(file)
    source = re.search(r"arXiv (\d+\.\d+)", file.read_text())
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {config.num_attention_heads}"
    position = POSITIONS.get(config.position.name, f"RoPE {config.position.model_dump().get('layout', '')}".strip())
    mlp = f"{config.mlp.activation} {config.mlp.name} {config.intermediate_size}"
    _, mapping = transformers_config(config, {"pad_token_id": config.pad_token_id})
    loads_as = mapping.architecture if mapping else "own code"
    link = f"[{source[1]}](https://arxiv.org/abs/{source[1]})" if source else "ours"
    kinds = f"{config.block.name}, {config.norm.name}"
    cells = (file.stem, f"{count_parameters(config):,}", shape, kinds, position, mlp, loads_as, link)
    return f"| {' | '.join(cells)} |"


def slot_row(slot: str, registry: Registry) -> str:
    entries = registry.entries.items()
    ours = [name for name, entry in entries if not entry.__module__.startswith(("tests.", "imported_", "examples."))]
    return f"| `{slot}` | {', '.join(f'`{name}`' for name in sorted(ours))} |"


def test_table_of_presets() -> None:
    lines = [
        "| preset | parameters | layers x width, heads | block, norm | positions | mlp | export loads as | source |",
        "|---|---|---|---|---|---|---|---|",
        *(preset_row(file) for file in sorted(PRESETS.glob("*.yaml"))),
    ]
    assert "\n".join(lines) in (ROOT / "docs/architectures.md").read_text(), "\n" + "\n".join(lines)


def test_tables_of_slots() -> None:
    lines = ["| slot | names |", "|---|---|", *(slot_row(slot, registry) for slot, registry in SLOTS.items())]
    assert "\n".join(lines) in (ROOT / "docs/architectures.md").read_text(), "\n" + "\n".join(lines)
    run = {"masking": MASKINGS, "objective": OBJECTIVES, "evaluations": EVALUATIONS}
    run |= {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "trainer.parallelism": PARALLELISMS}
    lines = ["| slot | names |", "|---|---|", *(slot_row(slot, registry) for slot, registry in run.items())]
    assert "\n".join(lines) in (ROOT / "docs/running.md").read_text(), "\n" + "\n".join(lines)


def test_the_page_on_data_names_every_part() -> None:
    page = (ROOT / "docs/data.md").read_text()
    for registry in (SOURCES, FILTERS, EXECUTORS):
        row = slot_row("", registry)
        missing = [name for name in re.findall(r"`(\w+)`", row) if f"`{name}`" not in page]
        assert not missing, (registry.slot_name, missing)


def test_each_page_on_a_part_names_its_registry_and_constructor() -> None:
    for slot in (*SLOTS, *ELSEWHERE.keys() - {"parallelism"}):  # which has no page
        page = "callback" if slot in ("callbacks", "algorithms", "loggers") else slot
        own = (ROOT / "docs" / "extending" / f"{page}.md").read_text()
        module, _, registry = ELSEWHERE.get(slot, "").rpartition(".")
        for said in (registry, module) if registry else (f'@flexbert.register("{slot}", NAME)',):
            assert said in own, page
        assert slot == "activation" or "`__init__(self, config" in own, page


def test_each_slot_has_a_page_that_the_site_lists() -> None:
    listed = set(re.findall(r"extending/(\w+)\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {page.stem for page in (ROOT / "docs/extending").glob("*.md")}
    others = (MASKINGS, OBJECTIVES, EVALUATIONS, SCHEDULES, OPTIMIZERS, SOURCES, FILTERS, TOKENIZERS, EXECUTORS)
    slots = {*SLOTS, "eval", *(each.slot_name for each in others)}
    # `callback` is the page of callbacks, algorithms and loggers
    assert listed == pages == slots | {"index", "callback"}


def reference_anchors() -> set[str]:
    return {f"#{re.sub(r'[^a-z0-9_ -]', '', line.lower()).replace(' ', '-')}" for line in headings(markdown())}


def test_links_inside_the_reference_lead_somewhere() -> None:
    addresses = set(re.findall(r"\]\((#[^)]+)\)", markdown()))
    assert len(addresses) > 10
    assert addresses <= reference_anchors()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    anchors = reference_anchors()
    for address in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if address.startswith("https://"):
            continue
        path, _, anchor = address.partition("#")
        target = page.parent / path if path else page
        if target.name == "reference.md":
            assert not anchor or f"#{anchor}" in anchors, address
            continue
        assert target.is_file(), address
        if anchor:
            ids = [re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings(target.read_text())]
            assert anchor in ids, address


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def test_files_that_pages_name_exist() -> None:
    names = re.compile(r"`((?:configs|data|docs|examples|flexbert|tests|training|commands|callbacks)/[\w./-]+\.\w+)`")
    for page in PAGES:
        missing = [name for name in names.findall(page.read_text()) if not (ROOT / name).exists()]
        assert not missing, (page.name, missing)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_what_the_loaders_take(text: str, tmp_path: Path) -> None:
    """A whole file loads; a part of one has keys and values that its schema knows."""
    file = tmp_path / "block.yaml"
    file.write_text(text)
    node: Any = OmegaConf.load(file)
    if "imports" in node or "letters" in text or "csv" in text:  # parts from outside: tests/test_examples.py
        return
    if {"name", "model", "data", "phases"} <= set(node):
        load_run_config(file)
    elif {"output", "streams", "tokenizer"} <= set(node):
        load_prepare_config(file)
    else:
        content: Any = OmegaConf.to_container(node)
        assert any(fits(content, kind, schema) for kind, schema in PARTS), text


# A part of a file may be of any kind, of a phase or of a stream; components from outside have any name.
PARTS = [("run", "RunConfig.open"), ("prepare", "PrepareConfig.partial"), ("model", "FlexBertConfig.partial")]
PARTS += [("eval", "EvalFile.open"), ("sweep", "SweepFile.partial")]
PARTS += [("run", "PhaseConfig.open"), ("run", "FlexBertConfig.open"), ("prepare", "StreamConfig.partial")]
OUTSIDE = {"serial", "words"}


def fits(content: Any, kind: str, name: str) -> bool:
    schema = json.loads((ROOT / f"configs/schema/{kind}.json").read_text())
    part = {"$defs": schema["$defs"], "$ref": f"#/$defs/{name}"}
    if kind == "prepare":
        named = {str(value.get("name") if isinstance(value, dict) else value) for value in content.values()}
        if named & OUTSIDE:
            return set(content) <= set(schema["$defs"]["PrepareConfig"]["properties"])
    return jsonschema.Draft7Validator(part).is_valid(content)


@pytest.mark.parametrize("text", [*blocks("python"), *blocks("py")])
def test_python_is_python(text: str) -> None:
    ast.parse(text)


def test_the_page_on_the_library_runs() -> None:
    names: dict[str, Any] = {}
    for text in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(text, names)
    assert names["logits"].shape == (12, names["config"].vocab_size)
    assert names["loss"].isfinite()
    assert names["states"].shape == (2, 7, names["config"].hidden_size)
    assert torch.equal(names["states"][0, 5:], torch.zeros(2, names["config"].hidden_size))


def test_the_readmes_parts_are_those_of_the_library() -> None:
    """The blocks that cannot run alone name what there is."""
    import flexbert

    text = "\n".join(text for page in PAGES for text in re.findall(r"\bflexbert\.(\w+)\(", page.read_text()))
    assert all(hasattr(flexbert, name) for name in text.split())
    assert f"{count_parameters(FlexBertConfig.from_yaml('modernbert-base')):,} parameters" in PAGES[0].read_text()


def test_a_site_that_asks_other_hosts_is_found(tmp_path: Path) -> None:
    from docs.check_site import requests_of

    (tmp_path / "page.html").write_text(
        '<link rel="canonical" href="https://ours.example/"><a href="https://arxiv.org">paper</a><img src="own.png">'
        '<script src="https://cdn.example/a.js"></script><img src="//cdn.example/b.png"/>'
        '<link rel="stylesheet" href="http://fonts.example/c.css">'
    )
    (tmp_path / "style.css").write_text("a { background: url(own.svg) } @import 'https://fonts.example/d.css';")
    assert requests_of(tmp_path) == [
        "page.html: <script> https://cdn.example/a.js",
        "page.html: <img> //cdn.example/b.png",
        "page.html: <link> http://fonts.example/c.css",
        "style.css: https://fonts.example/d.css",
    ]
