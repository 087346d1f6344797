"""What tests of the drop-in begin and end with."""

import warnings

import pytest

from glm4v_ext.integrations.transformers import disable


@pytest.fixture
def nothing_left_alone():
    """No op is left out of a model unless the test says so; behind it all models are as they were."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    disable()
