"""Shared by all tests: fresh memory is poisoned, so a kernel that leaves an output unwritten shows."""

import pytest
import torch
from hypothesis import settings

# The thorough profile is for releases: pytest --hypothesis-profile=thorough
settings.register_profile("usual", max_examples=200, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("usual")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty yields NaN for floats and the largest value for integers while a test runs."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = filled
