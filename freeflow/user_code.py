"""Functions that a system file names as `module:name`. Importing this module starts neither JAX nor ASE."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from freeflow.errors import InputError


def load_object(reference: str, folder: str | Path) -> Any:
    """What `module:name` stands for; the module lies in `folder` or where Python finds it.

    Raises:
        InputError: If there is no such module or name, or the module cannot be imported; one line.
    """
    module_name, _, name = reference.partition(":")
    module = _module(module_name, Path(folder).absolute())
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"potential: the module {module_name} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"potential: {reference} is no function, but of type {type(found).__name__}")
    return found


def _module(name: str, folder: Path) -> Any:
    beside = folder.joinpath(*name.split(".")).with_suffix(".py")
    # The folder stays on the path: the module may import its neighbours, now or when it is called.
    if beside.is_file() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        known = sys.modules.get(name)
        if known is None or not beside.is_file() or _same_file(known, beside):
            return importlib.import_module(name)
        # Two system files may each have a module of this name beside them.
        spec = importlib.util.spec_from_file_location(name, beside)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"potential: no module {name}, neither in {folder} nor installed") from None
        raise InputError(f"potential: cannot import {name}: {in_one_line(error)}") from None
    except Exception as error:  # whatever the user's module happens to raise
        raise InputError(f"potential: cannot import {name}: {in_one_line(error)}") from None


def _same_file(module: Any, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


def in_one_line(error: BaseException) -> str:
    """An exception's kind, message and innermost place, for an error message."""
    said = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text
