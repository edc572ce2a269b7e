"""Imports of packages that do not import as they are published: robustbench, torchvision, AutoAttack.

Their deprecation warnings are silenced during these imports only: the user cannot act on them.
"""

import importlib
import importlib.util
import re
import sys
import warnings
from types import ModuleType

import torch

from experiment import UserError

REQUIRED_NAMES = ("Wang2023Better_WRN-28-10", "Cui2023Decoupled_WRN-28-10")
"""Teachers that are missing in the old robustbench that torchattacks ships."""

REINSTALL = "pip install --force-reinstall --no-deps robustbench==1.1.1"

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_schemas: dict[str, torch.library.Library] = {}  # a schema lives as long as its Library object


def _import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def import_torchvision() -> ModuleType:
    """Import torchvision, also a CUDA build beside a CPU-only torch, which cannot load its operator library.

    There the import fails at the first operator. An empty schema of that name is enough for datasets and models. It is
    defined only after exactly this error: where the operator library loads, a second definition aborts the process.
    """
    while True:
        try:
            return _import_quietly("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            missing = _MISSING_OPERATOR.fullmatch(str(error))
            if missing is None or missing[1] in _schemas:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"torchvision cannot be imported ({reason}); run pip install -r requirements.txt"
                ) from error
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{missing[1]}(Tensor self) -> Tensor")
        _schemas[missing[1]] = library
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_autoattack() -> type:
    """The AutoAttack class of the attack's authors, in the package pyautoattack."""
    try:
        return _import_quietly("pyautoattack").AutoAttack
    except (ImportError, AttributeError) as error:
        raise UserError(f"AutoAttack cannot be imported ({error}); run pip install -r requirements.txt") from error


def import_robustbench() -> ModuleType:
    """Import robustbench with its model zoo, and check that it is not the old one that torchattacks ships.

    robustbench imports ``autoattack`` but depends on ``pyautoattack``, the same code under another name, which takes
    its place unless a real autoattack is installed (a stray folder of that name is not one).
    """
    import_torchvision()
    try:
        if "autoattack" not in sys.modules:
            spec = importlib.util.find_spec("autoattack")
            if spec is None or spec.origin is None:
                sys.modules["autoattack"] = _import_quietly("pyautoattack")
                sys.modules["autoattack.state"] = _import_quietly("pyautoattack.state")
        robustbench = _import_quietly("robustbench")
        names = linf_models(robustbench, "cifar100")
    except (ImportError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"robustbench cannot be imported ({reason}); run {REINSTALL}") from error
    lacking = [name for name in REQUIRED_NAMES if name not in names]
    if lacking:
        raise UserError(
            f"the installed robustbench has no {', '.join(lacking)} (torchattacks overwrote it with an old one); "
            f"run {REINSTALL}"
        )
    return robustbench


def linf_models(robustbench: ModuleType, dataset: str) -> dict:
    """RobustBench's registry of Linf models of a data set: name -> {"model": factory, "gdrive_id": id, ids or None}."""
    zoo = robustbench.model_zoo
    return zoo.model_dicts[zoo.enums.BenchmarkDataset(dataset)][zoo.enums.ThreatModel.Linf]
