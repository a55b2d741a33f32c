"""An autoresearch harness for MoUE-style language models. Start with `harness --help`."""

__version__ = "0.1.0"
