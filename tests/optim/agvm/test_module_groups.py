"""Groups by module hold every parameter once, and say so where they cannot."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.agvm.module_groups import groups_by_module


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.neck = nn.Linear(2, 3), nn.Linear(3, 3)
        self.roi_head = nn.ModuleDict({"bbox_head": nn.Linear(3, 1), "mask_head": nn.Linear(3, 2)})
        self.scale = nn.Parameter(torch.ones(1))


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_modules_parts_of_modules_and_single_parameters_make_groups():
    model = Detector()
    components = ["backbone", ("neck", "scale"), "roi_head.bbox_head", "roi_head.mask_head"]
    groups = groups_by_module(model, components)
    assert names(groups) == {
        "backbone": ["backbone.weight", "backbone.bias"],
        "neck+scale": ["neck.weight", "neck.bias", "scale"],
        "roi_head.bbox_head": ["roi_head.bbox_head.weight", "roi_head.bbox_head.bias"],
        "roi_head.mask_head": ["roi_head.mask_head.weight", "roi_head.mask_head.bias"],
    }
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert optimizer.param_groups[1]["param_names"] == ["neck.weight", "neck.bias", "scale"]
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())


def test_tied_weights_stand_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "rest": nn.Linear(2, 1)})
    model["b"].weight = model["a"].weight
    assert names(groups_by_module(model, [("a", "b"), "rest"]))["a+b"] == ["a.weight", "a.bias", "b.bias"]
    with pytest.raises(InputError, match=r"b.weight is in 'a' and in 'b': make both one component, in a tuple"):
        groups_by_module(model, ["a", "b", "rest"])


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            ["backbone", "roi_head"],
            "components leave out 3 of the model's parameters, which would never be updated: scale, neck.weight, neck",
        ),
        (
            ["backbone", "head"],
            r"the model has no parameters under 'head'; at its top are \['scale', 'backbone', 'neck', 'roi_head'\]",
        ),
        (["roi_head", "roi_head.mask_head"], "roi_head.mask_head.weight is in 'roi_head' and in 'roi_head.mask_head'"),
        ("backbone", r"components must be a list of names, as in \['backbone', 'head'\], got 'backbone'"),
        ([], "components must be a list of names"),
    ],
)
def test_what_does_not_cover_the_model_once_is_refused(components, message):
    with pytest.raises(InputError, match=message):
        groups_by_module(Detector(), components)
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, got list"):
        groups_by_module([], components)


def test_a_model_in_data_parallel_is_unwrapped():
    (group,) = groups_by_module(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), ["0"])
    assert group["name"] == "0"
