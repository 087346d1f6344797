import pytest
import torch

from examples.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A GLM-4.1V checkpoint of half a million random parameters."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)
