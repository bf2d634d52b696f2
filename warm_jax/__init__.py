"""Blur-noise mixture diffusion in JAX. For scripts and notebooks: `load`, `sample`, `fit`, `score` of `api.py`."""

__all__ = ["fit", "load", "sample", "score"]


def __getattr__(name: str):
    # Loaded when first asked for: the mathematics in `warm_jax.diffusion` needs none of what these need.
    if name in __all__:
        from warm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'warm_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")
