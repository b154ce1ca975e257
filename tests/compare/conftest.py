"""One endpoint on 127.0.0.1 that answers from our own model, for the tests of v4 compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import v4
from tests import tiny
from tests.endpoint import Endpoint, Run, prompt_file, serving


@pytest.fixture(scope="module")
def model() -> v4.LoadedModel:
    return v4.load(str(tiny.checkpoint("window-only")), backend="cpu", dtype=torch.float32, mtp=False)


@pytest.fixture(scope="module")
def server(model: v4.LoadedModel) -> Iterator[Endpoint]:
    with serving(model) as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.reset()
    return server


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def run(endpoint: Endpoint, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("tools.compare.client.MAX_PAUSE", 0.01)
    return Run(endpoint, prompts, capsys)
