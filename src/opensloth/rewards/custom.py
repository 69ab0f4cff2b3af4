"""Loads a user's own reward from `FILE.py:FUNCTION`."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensloth.errors import UserError, nearest


def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of the Python file `path`.

    The file's folder joins `sys.path` (last), so that it can import its neighbours.

    Raises:
        UserError: no such file or function, or the file does not run; with the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"The file of rewards {path} does not exist.", "Write FILE.py:FUNCTION, with the path from here."
        )
    module_name = f"opensloth_rewards_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file.", "Its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    if str(file.resolve().parent) not in sys.path:
        sys.path.append(str(file.resolve().parent))
    sys.modules[module_name] = module  # as import does: dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(
            f"{error.filename}, line {error.lineno}: {error.msg}.", "Correct the file of rewards."
        ) from error
    except Exception as error:  # anybody's code may raise anything; it ends the command with its place
        raise UserError(
            f"{place(error, file)}: {type(error).__name__}: {error}", "The file of rewards has to run on import."
        ) from error
    function = getattr(module, name, None)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    if function is None:
        hint = nearest(name, functions) or f"It has {', '.join(functions) or 'no functions'}."
        raise UserError(f"{path} has no function {name!r}.", hint)
    if not callable(function) or inspect.isclass(function) or inspect.iscoroutinefunction(function):
        raise UserError(
            f"{name!r} in {path} is no plain function.",
            "Write def NAME(prompts, completions, **columns): return scores.",
        )
    return function  # type: ignore[no-any-return]


def place(error: BaseException, file: Path) -> str:
    """`FILE, line N` of the innermost frame of `error` that lies in the user's file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    return f"{file}, line {lines[-1]}" if lines else str(file)
