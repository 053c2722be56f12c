"""The device that is named, or what would be right."""

import pytest
import torch

from batchlab.core.device import pick_device, product_eps, whole_float32
from batchlab.core.errors import InputError


def test_what_there_is():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["foo", "cpu:x", "cuda:99", 1.5])
def test_what_there_is_not_is_said_in_a_line(device):
    with pytest.raises(InputError, match=r"device must be one that torch finds here, as cpu or cuda:0, got ") as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)


@pytest.fixture
def switches():
    """torch's for TF32, all of them, by whichever names they are set."""
    matmul, conv, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    held = torch.get_float32_matmul_precision()
    yield lambda: (matmul.fp32_precision, conv.fp32_precision, rnn.fp32_precision)
    conv.fp32_precision = rnn.fp32_precision = "tf32"
    matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(held)


def older():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def newer():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("setting", [lambda: None, older, newer])
@pytest.mark.parametrize("error", [None, KeyError])
def test_tf32_is_off_inside_and_the_switches_are_then_as_they_were(switches, setting, error):
    setting()
    before = switches()
    try:
        with whole_float32():
            assert set(switches()) <= {"ieee", "none"}
            if error is not None:
                raise error
    except KeyError:
        pass
    assert switches() == before and before != ("ieee", "ieee", "ieee")


def test_a_cpu_multiplies_in_the_tensors_own_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert product_eps(torch.zeros(1, dtype=dtype)) == torch.finfo(dtype).eps
