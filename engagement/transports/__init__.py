"""Transports that come with the package, one file for each, and how a transport is found by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from engagement._sending.protocols import Transport


class TransportNotFound(ValueError):  # noqa: N818 - named after the event
    """There is nothing of that name, or no transport. The text gives the reason on one line (`myapp has no sned`)."""


def load_transport(name: str) -> Transport:
    """Return the transport named by `package.module:name`, as `--transport` does.

    The name stands for a function that takes a message, for an object with `send` or `send_many`, or for a class or
    another callable without arguments that makes one. A class with `from_environment` is made by that
    (`engagement.transports.webhook:Webhook`). Modules in the current directory are found. Raises `TransportNotFound`.
    """
    found = named(name)
    if _is_factory(found):
        found = _made_by(getattr(found, "from_environment", found), name)
    if not any(callable(candidate) for candidate in (found, *_sends(found))):
        raise TransportNotFound(
            f"{name} is a {type(found).__name__}, not a function or an object with send or send_many"
        )
    transport: Transport = found
    return transport


def named(name: str) -> Any:
    """Return the object that `package.module:name` stands for. Raises `TransportNotFound`."""
    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise TransportNotFound("write it as package.module:name")
    found: Any = _import(module_name)
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise TransportNotFound(f"{module_name} has no {attributes}") from None
    return found


def _import(module_name: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:  # noqa: PTH109 - sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as `python -m` does
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise TransportNotFound(f"there is no module {error.name} here or in this Python's packages") from None
        raise TransportNotFound(f"{module_name} cannot be imported: {_one_line(error)}") from error
    except Exception as error:  # a host's module may raise anything
        raise TransportNotFound(f"{module_name} cannot be imported: {_one_line(error)}") from error


def _sends(found: object) -> list[Any]:
    return [getattr(found, name, None) for name in ("send", "send_many")]


def _is_factory(found: object) -> bool:
    """Whether a call of `found` makes the transport: a class does, and a function that takes no message."""
    if inspect.isclass(found):
        return True
    if not callable(found) or any(map(callable, _sends(found))):
        return False
    try:
        inspect.signature(found).bind(object())
    except TypeError:
        return True
    except ValueError:  # written in C, without a signature
        return False
    return False


def _made_by(factory: Any, name: str) -> Any:
    try:
        return factory()
    except Exception as error:  # likewise
        raise TransportNotFound(f"{name}() failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
