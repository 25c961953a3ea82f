"""Peers as state machines: events in, effects out; no clock, no socket, no thread."""
