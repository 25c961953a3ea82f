"""Churn: what happens to peers and links while they learn, written, drawn or recorded.

A script is checked and spelled out before anything starts, the same for every runtime.
"""

from p2pfl.churn.build import load, parse
from p2pfl.churn.script import Happening, Kind, Script
from p2pfl.churn.sections import CHURN

__all__ = ["CHURN", "Happening", "Kind", "Script", "load", "parse"]
