"""Third-party packages that do not import as they are published, made importable: robustbench, torchvision, AutoAttack.

Every function here is a no-op beyond the import where the plain import works. Third-party deprecation warnings are
silenced during these imports only: the user cannot act on them.
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
"""Teachers that the old robustbench shipped inside torchattacks lacks."""

REINSTALL = "pip install --force-reinstall --no-deps robustbench==1.1.1"

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_schemas: dict[str, torch.library.Library] = {}  # a schema lives as long as its Library object


def _import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def import_torchvision() -> ModuleType:
    """Import torchvision, also the CUDA build of the package index beside a CPU-only torch.

    There torchvision's operator library cannot be loaded and the import stops at the first operator it registers a
    Python kernel for. An empty schema of that name lets it go on; datasets, transforms and models need no operator.
    A schema is defined only after exactly that error, because a second definition aborts the process where the
    operator library does load.

    Raises:
        UserError: torchvision is missing or broken in another way.
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
    """The AutoAttack class of the attack's authors, as the package pyautoattack publishes it.

    Raises:
        UserError: pyautoattack is not installed or cannot be imported.
    """
    try:
        return _import_quietly("pyautoattack").AutoAttack
    except (ImportError, AttributeError) as error:
        raise UserError(f"AutoAttack cannot be imported ({error}); run pip install -r requirements.txt") from error


def import_robustbench() -> ModuleType:
    """Import robustbench with its model zoo, and check that it is the real one.

    robustbench imports ``autoattack`` but depends on ``pyautoattack``, the same code under another name: that is put
    in its place unless a real autoattack is installed (a stray folder of that name is none). torchattacks ships an
    old ``robustbench/`` of its own; which of the two is on disk depends on the order of installation.

    Raises:
        UserError: robustbench is missing, cannot be imported, or is the old one; the message says how to mend it.
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
            f"the installed robustbench lacks {', '.join(lacking)} (torchattacks overwrote it with an old one); "
            f"run {REINSTALL}"
        )
    return robustbench


def linf_models(robustbench: ModuleType, dataset: str) -> dict:
    """RobustBench's registry of Linf models of ``cifar10`` or ``cifar100``.

    Returns:
        name -> {"model": factory, "gdrive_id": id, ids or None}.
    """
    zoo = robustbench.model_zoo
    return zoo.model_dicts[zoo.enums.BenchmarkDataset(dataset)][zoo.enums.ThreatModel.Linf]
