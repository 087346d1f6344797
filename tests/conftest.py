import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two shared cores: spinning barriers starve the other process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.backends.cudnn.allow_tf32 = False  # definitions in float32 are what is compared with
settings.register_profile("glm4v", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("glm4v")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], help="only tests that take a device, on this one")


def pytest_collection_modifyitems(config, items):
    if device := config.getoption("--device"):
        chosen = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("device") == device]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
