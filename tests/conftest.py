"""Shared fixtures. Nothing here, and no test, touches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hugging Face libraries are imported: they read it once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is imported: spinning threads are 50 times slower when another process wants their core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random

import numpy as np
import pytest
import torch

from restpoint.model.load import Loaded, load

# Small tensors: threads beyond the machine's share cost more than they bring, most of all under pytest-xdist.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Loaded:
    """The bundled model in float32 on the CPU. Shared by all tests: leave it as it is."""
    return load(dtype="float32", device="cpu")
