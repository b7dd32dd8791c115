"""Which libraries produced a result."""

import functools
import importlib.metadata
import platform

_RECORDED = (
    *("tapvit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("scikit-learn", "onnx", "onnxruntime", "jax2onnx"),
)


@functools.lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results, for the record."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
