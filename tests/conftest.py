"""Shared by all tests: no deadlines for hypothesis, one thread, global generators as they were."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("batchlab", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("batchlab")


@pytest.fixture(autouse=True)
def _quiet_torch():
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
