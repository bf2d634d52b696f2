"""Blur-noise mixture diffusion in JAX. For scripts and notebooks: `load`, `sample`, `fit`, `score` of `api.py`.

`restorer` makes a trained model a restorer of photographs. The mathematics is in `warm_jax.diffusion`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warm_jax.api import Model, fit, load, sample, score
    from warm_jax.restoration.posterior import load as restorer

__all__ = ["Model", "fit", "load", "restorer", "sample", "score"]
_PLACES = dict.fromkeys(__all__, "warm_jax.api") | {"restorer": "warm_jax.restoration.posterior"}

try:
    __version__ = importlib.metadata.version("warm_jax")
except importlib.metadata.PackageNotFoundError:  # as from a copy of the repository, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: the mathematics in `warm_jax.diffusion` needs none of what these need.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), "load" if name == "restorer" else name)
    raise AttributeError(f"module 'warm_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
