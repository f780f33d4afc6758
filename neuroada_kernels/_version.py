"""The package's version, for setup.py and for the package itself."""

__version__ = "0.1.0"
