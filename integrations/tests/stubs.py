"""Load real files of an engine's wheel, with what they import of absent packages stubbed."""

import sys
import types


class Stub(types.ModuleType):
    """A module with the names given, and a path where it stands before real submodules."""

    def __init__(self, name, path=None, **names):
        super().__init__(name)
        self.__path__ = [] if path is None else [str(path)]
        self.__dict__.update(names)


def install(monkeypatch, modules):
    """Put stubs into `sys.modules`, as attributes of their parents, for the length of a test.

    What the test imports below their top-level names is taken out again afterwards.
    """
    tops = {name.split(".")[0] for name in modules}
    for name in [n for n in sys.modules if n.split(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, name)
    for name in sorted(modules):
        monkeypatch.setitem(sys.modules, name, modules[name])
        parent, _, last = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], last, modules[name])
    return tops


def remove(tops):
    """Forget every module below top-level names."""
    for name in [n for n in sys.modules if n.split(".")[0] in tops]:
        del sys.modules[name]
