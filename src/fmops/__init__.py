"""FMOps: take a foundation model round its whole life from one spec."""

__version__ = "0.1.0"
