"""Settings of the transports, from the environment. An error names the variable, never its value."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from engagement.transports.rendering import Render

RENDER = "ENGAGEMENT_RENDER"
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Settings:
    """Variables whose names begin with `prefix`. An empty one counts as not set."""

    def __init__(self, prefix: str, environ: Mapping[str, str] | None = None) -> None:
        self._prefix = prefix
        self._environ = os.environ if environ is None else environ

    def text(self, name: str, default: str | None = None) -> str:
        """Return a setting, or `default`; raise `ValueError` if there is neither."""
        value = self._environ.get(self._prefix + name) or default
        if value is None:
            raise ValueError(f"{self._prefix}{name}: is not set")
        return value

    def secret(self, name: str) -> str | None:
        """Return a secret, from the variable or from the file that the variable with `_FILE` names."""
        path = self._environ.get(f"{self._prefix}{name}_FILE")
        if not path:
            return self._environ.get(self._prefix + name) or None
        try:
            return Path(path).read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._prefix}{name}_FILE: cannot be read: {type(error).__name__}") from None

    def flag(self, name: str) -> bool:
        """Return a yes or no. A variable that is not set is a no."""
        try:
            return _FLAGS[self.text(name, "no").lower()]
        except KeyError:
            raise ValueError(f"{self._prefix}{name}: must be yes or no") from None

    def seconds(self, name: str, default: timedelta) -> timedelta:
        """Return a number of seconds."""
        try:
            return timedelta(seconds=float(self.text(name, str(default.total_seconds()))))
        except (ValueError, OverflowError):
            raise ValueError(f"{self._prefix}{name}: must be a number of seconds") from None

    def render(self) -> Render[Any] | None:
        """Return the function that ENGAGEMENT_RENDER names as `package.module:name`, or None if it is not set."""
        name = self._environ.get(RENDER)
        if not name:
            return None
        module_name, _, attributes = name.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{RENDER}: is no package.module:name that can be imported: {error}") from None
        render: Render[Any] = found
        return render


def required(render: Render[Any] | None) -> Render[Any]:
    """Return `render`, or raise `ValueError` if there is none."""
    if render is None:
        raise ValueError(
            f"{RENDER}: is not set: name the function that turns a message into text, as package.module:name"
        )
    return render
