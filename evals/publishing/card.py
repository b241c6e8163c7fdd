"""The model card of a revision: what an export's README.md says, and above and below it what the run knows besides."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evals.publishing.shareable import public_name
from flexbert.hf.verify import PARITY_FILE
from recipe.config import RunConfig
from recipe.publishing import PublishConfig

PLACE = "PATH/TO/THIS/FOLDER"  # in an export's README.md
TAGS = ("flexbert", "masked-language-modeling", "sentence-transformers", "feature-extraction")


class Result(NamedTuple):
    """A measured number, as the hub's metadata has it. dataset: its name for people."""

    task: str
    dataset: str
    metric: str
    value: float


class CardFacts(NamedTuple):
    """What a card tells of a revision. streams: slots seen by stream's name. curves: whether there is a picture."""

    name: str
    tokens: int
    results: Sequence[Result]
    streams: dict[str, int]
    curves: bool


def model_card(export: Path, config: RunConfig, origin: dict[str, Any] | None, facts: CardFacts) -> str:
    """README.md. Raises OSError when the export has none."""
    publish = config.publish
    assert publish is not None
    head, body = _parts((export / "README.md").read_text(encoding="utf-8"))
    own_code = (export / "modeling_flexbert.py").is_file()
    for path in [origin and origin["from"], getattr(config.model.init, "source", None)]:
        if path:
            body = body.replace(f"`{path}`", f"`{public_name(str(path))}`")
    if publish.repo is not None:
        body = body.replace(f'model="{PLACE}"', f'model="{publish.repo}", revision="{facts.name}"')
    sections = [
        body.rstrip("\n"),
        _data(facts.streams),
        _evaluation(facts.results),
        "## Curves\n\n![loss, learning rate, batch size, RoPE theta and row length against tokens](curves.png)"
        if facts.curves
        else "",
        _loading(publish, facts.name, own_code),
        _parity(export / PARITY_FILE),
        "## Training\n\n`training_config.yaml` is the run file, without paths: "
        "`python main.py train training_config.yaml` trains such a model once it names your data.",
    ]
    front = yaml.safe_dump(_front_matter(head, config, facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n" + "\n\n".join(section for section in sections if section) + "\n"


def _parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest."""
    if not text.startswith("---\n"):
        return {}, text
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head) or {}, body


def _front_matter(head: dict[str, Any], config: RunConfig, facts: CardFacts) -> dict[str, Any]:
    publish = config.publish
    assert publish is not None
    node: dict[str, Any] = {}
    if publish.licence:
        node["license"] = publish.licence
    if publish.language:
        node["language"] = list(publish.language)
    node |= {**head, "tags": [*head.get("tags", []), *TAGS]}
    if facts.results:
        from huggingface_hub import EvalResult
        from huggingface_hub.repocard_data import eval_results_to_model_index

        results = [
            EvalResult(
                task_type=result.task,
                dataset_type=result.dataset.lower().replace(" ", "-"),
                dataset_name=result.dataset,
                metric_type=result.metric.replace(" ", "_"),
                metric_name=result.metric,
                metric_value=result.value,
            )
            for result in facts.results
        ]
        node["model-index"] = eval_results_to_model_index(config.name, results)
    return node


def _data(streams: dict[str, int]) -> str:
    total = sum(streams.values())
    if not total:
        return ""
    rows = [f"| {_cell(name)} | {tokens:,} | {tokens / total:.1%} |" for name, tokens in streams.items()]
    return "\n".join(["## Data", "", "| stream | tokens seen | share |", "|---|---|---|", *rows])


def _evaluation(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [f"| {_cell(each.dataset)} | {_cell(each.metric)} | {each.value:.4f} |" for each in results]
    return "\n".join(["## Evaluation", "", "| data | metric | value |", "|---|---|---|", *rows])


def _loading(publish: PublishConfig, revision: str, own_code: bool) -> str:
    if publish.repo is not None:
        place, more = f'"{publish.repo}"', f', revision="{revision}"'
        local = f'snapshot_download("{publish.repo}", revision="{revision}")'
        fetch = "from huggingface_hub import snapshot_download\n"
    else:
        place, more, local, fetch = f'"{PLACE}"', "", f'"{PLACE}"', ""
    trust = ", trust_remote_code=True" if own_code else ""
    return f"""## How to load

With transformers, as an encoder:

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained({place}{more}{trust})
tokenizer = AutoTokenizer.from_pretrained({place}{more}{trust})
```

With sentence-transformers: an embedding is the mean of the last hidden states. It is not trained for similarity:
fine-tune it first.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({place}{more}{trust})
```

Unpadded, with FlexBERT: sequences lie end to end, without padding. On a CUDA device attention is flash attention's
where it is installed.

```python
import flexbert, torch
{fetch}
model = flexbert.from_hf({local}{trust}).to("cuda", torch.bfloat16).eval()
logits = model(input_ids, cu_seqlens, max_seqlen).logits  # (tokens,), (sequences + 1,) int32, the longest length
```"""


def _parity(file: Path) -> str:
    """Of an export of an older version there is none."""
    if not file.is_file():
        return ""
    node = json.loads(file.read_text())
    return (
        f"## Parity\n\nBefore it was published, this export was loaded by transformers {node['transformers']}. Its "
        f"logits differ from those of the model that was trained by {node['largest_logit_difference']:.1e} "
        f"at most ({node['dtype']}, sequences of {', '.join(map(str, node['sequence_lengths']))} tokens, alone and "
        f"padded; {node['tolerance']:.0e} is allowed)."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
