"""A published revision is what people load: by transformers and by sentence-transformers, from a hub, without a warning."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub import Hub, hub_environment, run_hub
from tests.helpers.in_process import go
from tests.helpers.publishing import EXPORTS, Pushes, write_run
from tests.helpers.runs import environment

LOAD = """
import json, logging, sys, warnings
warnings.simplefilter("error")
for action in ("ignore",):  # of what these packages import, and say of one another
    warnings.filterwarnings(action, category=DeprecationWarning)
    warnings.filterwarnings(action, category=FutureWarning)
said = []
class Ear(logging.Handler):
    def emit(self, record): said.append(record.name + ": " + record.getMessage())
repo, revisions, trust, pooler = json.loads(sys.argv[1])
import torch, transformers
from sentence_transformers import SentenceTransformer
for name in ("transformers", "sentence_transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Ear(level=logging.WARNING))
more = {"trust_remote_code": True} if trust else {}
found = {}
texts = ["w8 w9 w10", "w11", "w12 w13 w14 w15 w16 w17"]
for revision in revisions:
    fewer = {} if pooler is None else {"add_pooling_layer": False}
    model = transformers.AutoModel.from_pretrained(repo, revision=revision, **more, **fewer).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo, revision=revision, **more)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (states * mask).sum(1) / mask.sum(1)
    sentences = SentenceTransformer(repo, revision=revision, device="cpu", **more)
    embeddings = torch.tensor(sentences.encode(texts))
    found[revision] = {
        "difference": float((embeddings - mean).abs().max()),
        "longest": sentences.max_seq_length,
        "norm": float(mean.norm()),
        "vector": mean[0, :3].tolist(),
    }
print(json.dumps({"said": said, "found": found}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with run_hub(tmp_path_factory.mktemp("hub"), token="secret") as hub:
        yield hub


@pytest.fixture(scope="module")
def pushes(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushes]:
    pushes = Pushes(hub_environment(hub, tmp_path_factory.mktemp("home"), token="secret"))
    yield pushes
    pushes.close()


def load(hub: Hub, home: Path, repo: str, revisions: list[str], trust: bool, pooler: bool | None = None) -> Any:
    """In a process without FlexBERT, which knows nothing but the repository's name."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, json.dumps([repo, revisions, trust, pooler])],
        env=environment() | hub_environment(hub, home) | {"TOKENIZERS_PARALLELISM": "false"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "Warning" not in done.stderr, done.stderr
    return answer


def check(answer: Any, revisions: list[str]) -> None:
    assert answer["said"] == []
    for revision in revisions:
        assert answer["found"][revision]["difference"] < 1e-6  # measured 1.2e-7
        assert answer["found"][revision]["longest"] == 64
        assert answer["found"][revision]["norm"] > 0.1
    vectors = {tuple(answer["found"][revision]["vector"]) for revision in revisions}
    assert len(vectors) == len(set(revisions) - {"main"})  # each revision has weights of its own; main is one of them


@pytest.mark.slow
def test_revisions_load_without_a_warning(finished: Path, tmp_path: Path, hub: Hub, pushes: Pushes) -> None:
    code, text = pushes.push(str(finished), "publish.repo=org/modernbert")
    (finished / "publish.json").unlink()
    assert code == 0, text
    revisions = [*EXPORTS, "main"]
    check(load(hub, tmp_path, "org/modernbert", revisions, False), revisions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("own code", marks=pytest.mark.long), "bert"])
def test_other_architectures_load_without_a_warning(
    tiny_data: Path, tmp_path: Path, hub: Hub, pushes: Pushes, kind: str
) -> None:
    """With code of their own; and BERT, whose AutoModel makes a pooler unless it is told not to."""
    bert = {
        "preset": "bert-base",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        **dict.fromkeys(f"{role}_token_id" for role in ("pad", "cls", "sep", "mask")),
    }
    run = go(write_run(tmp_path / "run", tiny_data, model=bert if kind == "bert" else {"norm": "rmsnorm"}))
    repo = f"org/{kind.replace(' ', '-')}"
    code, text = pushes.push(str(run), f"publish.repo={repo}")
    assert code == 0, text
    own = (run / "exports/tokens-0/modeling_flexbert.py").exists()
    assert own == (kind == "own code")
    revisions = [EXPORTS[1], EXPORTS[3], "main"]
    check(load(hub, tmp_path, repo, revisions, own, False if kind == "bert" else None), revisions)
