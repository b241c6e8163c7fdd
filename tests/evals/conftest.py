"""Tiny exports with random weights, made once."""

from pathlib import Path

import pytest

from evals.interface import Model
from tests.helpers.texts import model_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def headless(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without its masked-token head, as all-MiniLM is."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "headless"
    AutoModel.from_pretrained(model.folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.folder).save_pretrained(folder)
    return folder
