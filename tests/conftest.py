"""What all tests share."""

import os
import runpy
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # demo assets come from PyPI; nothing in the tests asks a model hub
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on standard output which one it found

TINY = Path(__file__).parent.parent / "scripts" / "tiny_model.py"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny random Llama, train.csv, public.csv and config.yaml: see scripts/tiny_model.py."""
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(TINY))["write"](folder)
    return folder


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing from threads, and on a shared machine lose by them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
