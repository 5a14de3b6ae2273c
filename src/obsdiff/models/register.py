"""Makes ``DiffusionPipeline.from_pretrained`` know shrunk models once obsdiff is imported, without importing diffusers.

diffusers resolves the library name of a component first among the attributes of ``diffusers.pipelines``. A finder waits
for that module and adds ``obsdiff_shrunk`` to it; nothing else of diffusers is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TARGET = "diffusers.pipelines"
LIBRARY = "obsdiff_shrunk"


class _LazyLibrary(ModuleType):
    """Stands for the library and imports it at the first look."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        from obsdiff.models import obsdiff_shrunk

        return getattr(obsdiff_shrunk, name)


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        setattr(sys.modules[TARGET], LIBRARY, sys.modules[LIBRARY])  # diffusers swaps in a lazy module of its own


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Install the name, now or when diffusers is imported; calling it again changes nothing."""
    if LIBRARY in sys.modules:
        return
    sys.modules[LIBRARY] = _LazyLibrary(LIBRARY)
    if TARGET in sys.modules:
        setattr(sys.modules[TARGET], LIBRARY, sys.modules[LIBRARY])
    else:
        sys.meta_path.insert(0, _Finder())
