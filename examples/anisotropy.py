"""An evaluation: how alike the mean embeddings of any two texts are (anisotropy, arXiv 1909.00512, section 4)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from evals.interface import EVALS, Eval, EvalConfig, Model, Scores
from flexbert_core.schema import ConfigError, UserPath


@EVALS.register("anisotropy")
class Anisotropy(Eval):
    """The mean cosine of mean embeddings over all pairs of the lines of a text file; near 1 they fill a narrow cone."""

    class Config(EvalConfig):
        texts: UserPath
        """A text file, one text a line; two lines or more."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        file = Path(config.texts)
        if not file.is_file():
            raise ConfigError(f"texts: {file}: no such file")
        self.texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(self.texts) < 2:
            raise ConfigError(f"texts: {file}: has {len(self.texts)} lines with text: two are needed for a pair")

    @torch.no_grad()
    def run(self, model: Model, out: Path) -> Scores:
        encoder = AutoModel.from_pretrained(model.folder, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=True)
        rows = []
        for text in self.texts:
            inputs = tokenizer(text, truncation=True, return_tensors="pt")
            rows.append(encoder(**inputs).last_hidden_state[0].mean(0))
        units = F.normalize(torch.stack(rows), dim=1)
        cosines = units @ units.T
        count = len(rows)
        return {"mean cosine": (cosines.sum().item() - count) / (count * (count - 1))}
