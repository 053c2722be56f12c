"""Optimizers of other packages, where they are installed: none is a dependency."""

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def peers() -> dict[str, Callable[..., Any]]:
    """timm's LAMB and LARS, pytorch_optimizer's LAMB, LARS, CAME, Lion and AdEMAMix, by name; those that are there.

    timm is read by its optimizer files alone, for the package itself needs torchvision.
    """
    found: dict[str, Callable[..., Any]] = {}
    if spec := importlib.util.find_spec("timm"):
        folder = Path(spec.origin or "").parent
        for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # others ask for it
            sys.modules[name] = package
        found["timm lamb"] = importlib.import_module("timm.optim.lamb").Lamb
        found["timm lars"] = importlib.import_module("timm.optim.lars").Lars
    if importlib.util.find_spec("pytorch_optimizer"):
        package = importlib.import_module("pytorch_optimizer")
        names = {"lamb": "Lamb", "lars": "LARS", "came": "CAME", "lion": "Lion", "ademamix": "AdEMAMix"}
        found |= {f"pytorch_optimizer {name}": getattr(package, what) for name, what in names.items()}
    return found
