"""Models that lie on the hub: their code runs only when it was asked for."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from evals.models import resolve
from flexbert_core.schema import ConfigError
from tests.helpers.exports import write_export
from tests.helpers.hub import Hub, hub_environment, run_hub
from tests.helpers.runs import ROOT, command, run

REPO = "org/model"


def upload(hub: Hub, folder: Path) -> None:
    api = HfApi(token=False)
    api.create_repo(REPO, exist_ok=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)


@pytest.mark.slow
def test_a_model_of_the_hub_and_one_that_brings_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_export(tmp_path / "model")
    file = tmp_path / "weigh.yaml"
    (tmp_path / "made").mkdir()
    file.write_text(
        f"imports: [{ROOT}/tests/helpers/weigher.py]\nevaluation: {{name: weigher, count_in: {tmp_path}/made}}\n"
    )
    with run_hub(tmp_path / "hub") as hub:
        extra = hub_environment(hub, tmp_path / "home")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # HF_ENDPOINT's, when the package was imported
        upload(hub, folder)
        arguments = ["eval", str(file), "--output", str(tmp_path / "results")]
        plain = run(command(*arguments, f"hf:{REPO}"), extra=extra)
        assert plain.returncode == 0, plain.stderr
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
        (folder / "code.py").write_text("raise SystemExit('it ran')\n")
        upload(hub, folder)
        refused = run(command(*arguments, f"hf:{REPO}"), extra=extra)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1] == (
            f"error: hf:{REPO}: brings Python code (config.json: auto_map): hf+code:{REPO} runs it, if you trust it"
        )
        asked = run(command(*arguments, f"hf+code:{REPO}"), extra=extra)
        assert asked.returncode == 0, asked.stderr
        assert list((tmp_path / "home").rglob("code.py"))


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="^hf:org/none: cannot be had from the Hugging Face hub"):
        resolve(["hf:org/none"], tmp_path)
