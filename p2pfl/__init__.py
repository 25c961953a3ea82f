"""Decentralised learning: peers train on their own data and average, with no server."""

__version__ = "0.1.0"
