"""fedsim: how often must machines that train together talk, and what does it cost?

``fedsim.localsgd``, ``centralized``, ``grid`` and ``study`` train; see `fedsim.api`. They are imported when first used,
so that ``import fedsim`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim.errors import RunFailed, UserError

if TYPE_CHECKING:
    from fedsim.api import Result, StudyResult, centralized, grid, localsgd, study

__version__ = "0.1.0"
__all__ = ["Result", "RunFailed", "StudyResult", "UserError", "centralized", "grid", "localsgd", "study"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fedsim.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
