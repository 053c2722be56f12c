"""The device that is named, or what would be right."""

import pytest
import torch

from batchlab.core.device import pick_device
from batchlab.core.errors import InputError


def test_what_there_is():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["foo", "cpu:x", "cuda:99", 1.5])
def test_what_there_is_not_is_said_in_a_line(device):
    with pytest.raises(InputError, match=r"device must be one that torch finds here, as cpu or cuda:0, got ") as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)
