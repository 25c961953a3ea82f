"""An honest pair as a program of its own, whose memory can be measured.

``victim.py KEYED ROUNDS`` prints as JSON where it listens and all keys, then ``training``, and
in the end how both have ended. The third neighbour's socket is inherited: it is ours to close.
"""

import json
import sys
import time

import torch
from hostile_cases import HONEST, MAD, SOON, VALUE, VICTIM, Peers, constant

WARM = 20  # rounds after which memory is what it will be

if __name__ == "__main__":
    keyed, rounds = map(int, sys.argv[1:])
    peers = Peers(constant(rounds=rounds), bool(keyed))
    peers.sockets[MAD].close()
    keys = [[one.public, one.secret] for one in peers.keys]
    print(json.dumps({"ports": peers.ports, "keys": keys}), flush=True)
    with peers.running((VICTIM, HONEST)) as running:
        while peers.rounds[VICTIM] < WARM and not running[0].done():
            time.sleep(0.01)
        print("training", flush=True)
        ends = [peer.result(3 * SOON) for peer in running]
    for end in ends:
        torch.testing.assert_close(end.ending.params, torch.full_like(end.ending.params, VALUE))
    told = {"rounds": [one.rounds for one in ends], "rejections": ends[0].rejections}
    print(json.dumps(told), flush=True)
