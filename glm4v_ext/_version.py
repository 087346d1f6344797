"""The one version of the distribution; CMake and pyproject.toml read it from here."""

__version__ = "0.1.0"
