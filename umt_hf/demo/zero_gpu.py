"""Work for a visitor on the GPU that a Space is lent for it (ZeroGPU); without the package `spaces`, as it is.

ZeroGPU runs a function that `spaces.GPU` decorates in another process, forked from this one after the models were
loaded: values go there and results come back as pickles, so that they name models instead of holding them.
"""

import itertools
import weakref
from typing import Any

try:
    import spaces  # pyrefly: ignore[missing-import]  where a Space has it
except ImportError:
    spaces = None

from .models import DemoModels

SECONDS = 60  # that a visitor's quota has to have left

_pages: weakref.WeakValueDictionary[int, DemoModels] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_page(models: DemoModels) -> int:
    """Number of a page, by which `ask_model` finds its models."""
    number = next(_numbers)
    _pages[number] = models
    return number


def _ask_model(page: int, part: str, method: str, *values: Any) -> Any:
    """Call a method of one of a page's models.

    Args:
        page: Its number.
        part: Field of `DemoModels`.
        method: Of that model.
        *values: What it is called with.
    """
    return getattr(getattr(_pages[page], part), method)(*values)


def choose_runner(library: Any) -> Any:
    """How `ask_model` works: by the decorator of `spaces`, which leaves a function alone outside of ZeroGPU.

    Args:
        library: The package, or `None`.
    """
    return library.GPU(duration=SECONDS)(_ask_model) if hasattr(library, "GPU") else _ask_model


# ZeroGPU looks for decorated functions when the Space starts.
ask_model = choose_runner(spaces)
