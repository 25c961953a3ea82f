"""Attacks: what peers that mean harm send, or learn from."""

from __future__ import annotations

from p2pfl.attacks.attack import Attack, Known
from p2pfl.attacks.hostile import hostile
from p2pfl.attacks.lies import ATTACKS, alie_z

__all__ = ["ATTACKS", "Attack", "Known", "alie_z", "hostile"]
