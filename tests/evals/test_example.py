"""An evaluation from outside, named by its file: as it is documented."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModel

from commands.evaluate import run_eval
from flexbert_core.schema import ConfigError
from tests.helpers.exports import write_bert
from tests.helpers.runs import ROOT


def test_an_evaluation_from_outside(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    texts = ["word1 word2", "word3", "word4 word5 word6"]
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n\n")
    file = tmp_path / "anisotropy.yaml"
    file.write_text(
        f"imports: [{ROOT}/examples/anisotropy.py]\nevaluation: {{name: anisotropy, texts: {tmp_path}/lines.txt}}\n"
    )
    assert run_eval(str(file), [str(folder)], tmp_path / "out", Console(quiet=True))
    node = json.loads(next((tmp_path / "out" / "anisotropy").glob("bert-*/results.json")).read_text())
    model = AutoModel.from_pretrained(folder)
    rows = []
    for words in ([6, 7], [8], [9, 10, 11]):  # word0 is id 5; [CLS] 1, [SEP] 2
        with torch.no_grad():
            rows.append(model(torch.tensor([[1, *words, 2]])).last_hidden_state[0].mean(0))
    pairs = [torch.cosine_similarity(rows[a], rows[b], dim=0).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert node["scores"]["mean cosine"] == pytest.approx(sum(pairs) / 3, rel=1e-5)
    (tmp_path / "lines.txt").write_text("one\n")
    with pytest.raises(ConfigError, match=r"anisotropy: texts: .*lines\.txt: has 1 lines with text: two are needed"):
        run_eval(str(file), [str(folder)], tmp_path / "out", Console(quiet=True))
