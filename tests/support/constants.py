"""Constants of the engine made small, wherever they were imported."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest.mock import patch


@contextmanager
def changed(home: ModuleType, **values: object) -> Iterator[None]:
    """Within the block constants of `home` have these values, also in each module of its package that imported them.

    Raises AttributeError for a name that `home` does not have: it was moved or renamed, and the test would go blind.
    """
    package = home.__name__.partition(".")[0]
    with ExitStack() as stack:
        for name, value in values.items():
            before = getattr(home, name)
            for key, module in list(sys.modules.items()):
                if key.partition(".")[0] == package and vars(module).get(name) is before:
                    stack.enter_context(patch.object(module, name, value))
        yield
