"""A guarded listener as a program of its own, whose memory can be measured.

``guarded.py STRANGERS PUBLIC...`` prints its port and public key; for every line on standard
input it prints what it has come to, as JSON, and ends with standard input.
"""

import json
import os
import sys
from collections import Counter

import psutil
import zmq
from security_cases import Door

from p2pfl.security.keys import KeyPair

if __name__ == "__main__":
    strangers, *allowed = sys.argv[1:]
    with Door(*(KeyPair(key, "") for key in allowed), strangers=int(strangers)) as door:
        print(json.dumps({"address": door.address, "key": door.keys.public}), flush=True)
        poller, delivered, process = zmq.Poller(), Counter(), psutil.Process()
        poller.register(door.listener, zmq.POLLIN)
        poller.register(sys.stdin, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if door.listener in ready:
                delivered[door.read()[0]] += 1
            if sys.stdin.fileno() in ready:
                if not os.read(0, 1 << 10):
                    break
                told = {"rss": process.memory_info().rss, "fds": process.num_fds()}
                told |= {"delivered": delivered, "refused": door.gate.refused()}
                print(json.dumps(told), flush=True)
