"""Every language-model training objective, exact, as a pure JAX function."""

__version__ = "0.1.0"
