"""Who is there: every peer keeps a list of all, finds out who is gone, and tells the others.

The protocol is SWIM with the rules of Lifeguard (docs/membership.md). Everything here is
a state machine: no clock, no socket, no thread.
"""
