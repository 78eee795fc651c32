"""``import flash_attn`` finds fastgpt's interface where the real package is absent."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

NAME, DISTRIBUTION, VERSION = "flash_attn", "flash-attn", "2.8.3"  # whose interface it is
OWN = "fastgpt.integrations.flash_attn"
TRANSFORMERS = "transformers.modeling_flash_attention_utils"


class _Alias(importlib.abc.Loader):
    def __init__(self, own: str) -> None:
        self.own = own

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.own)


class _Metadata(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of a package that was installed."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {VERSION}\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _After(importlib.abc.Loader):
    """Another loader, and then something more."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()


class Installation(importlib.abc.MetaPathFinder):
    """What :func:`install` did; ends with :meth:`undo`, or where ``with install():`` does."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        sys.meta_path.insert(0, self)
        _forget_what_is_installed()
        if TRANSFORMERS in sys.modules:
            self._tell_transformers()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Takes everything back; what has been imported from it by then goes on working."""
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
            del sys.modules[name]
        for where, name, before in reversed(self._replaced):
            if isinstance(where, dict):
                where[name] = before
            else:
                setattr(where, name, before)
        self._replaced.clear()
        _forget_what_is_installed()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == TRANSFORMERS:
            return self._spec_of_transformers(fullname, path, target)
        if fullname != NAME and not fullname.startswith(NAME + "."):
            return None
        own = OWN + fullname[len(NAME) :]
        try:
            spec = importlib.util.find_spec(own)
        except ModuleNotFoundError:
            return None
        if spec is None:
            return None
        is_package = spec.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(
            fullname, _Alias(own), origin=spec.origin, is_package=is_package
        )

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        asked = None if context is None else context.name
        if asked is None or asked.replace("_", "-").lower() == DISTRIBUTION:
            yield _Metadata()

    def _spec_of_transformers(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader, self._tell_transformers)
        return spec

    def _replace(self, where: Any, name: str, value: Any) -> None:
        before = where[name] if isinstance(where, dict) else getattr(where, name)
        self._replaced.append((where, name, before))
        if isinstance(where, dict):
            where[name] = value
        else:
            setattr(where, name, value)

    def _tell_transformers(self) -> None:
        """That flash-attn is there without a GPU, too."""
        module = sys.modules[TRANSFORMERS]
        for name in ("transformers.utils.import_utils", "transformers.utils", TRANSFORMERS):
            self._replace(sys.modules[name], "is_flash_attn_2_available", _always)
        entry = module.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        self._replace(entry, "general_availability_check", _always)
        self._replace(entry, "supported_devices", ((_always, "cpu"), *entry["supported_devices"]))


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _forget_what_is_installed() -> None:
    """transformers keeps what it has found, and the functions that it has found it for."""
    importlib.invalidate_caches()
    module = sys.modules.get("transformers.utils.import_utils")
    for name in (
        "_package_distribution_mapping",
        "is_flash_attn_2_available",
        "is_flash_attn_greater_or_equal",
    ):
        if clear := getattr(getattr(module, name, None), "cache_clear", None):
            clear()
    utils = sys.modules.get(TRANSFORMERS)
    if utils is not None and vars(utils)["_loaded_implementation"] == "flash_attention_2":
        vars(utils)["_loaded_implementation"] = None


def install() -> Installation:
    """``import flash_attn`` and its modules find fastgpt's, and so does what imports it: other people's code,
    and transformers' ``attn_implementation="flash_attention_2"``, on the CPU too.

    Returns:
        the installation, whose ``undo()`` takes it back; ``with install(): ...`` does it at the end.

    Raises:
        RuntimeError: the real flash-attn is installed, or fastgpt's already is.
    """
    if any(isinstance(finder, Installation) for finder in sys.meta_path):
        raise RuntimeError("flash_attn: fastgpt's is installed already")
    if importlib.util.find_spec(NAME) is not None:
        raise RuntimeError(
            "flash_attn: the real one is installed; import fastgpt.integrations.flash_attn by its name"
        )
    return Installation()
