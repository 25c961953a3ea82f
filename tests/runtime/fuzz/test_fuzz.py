"""Whatever arrives, the decoders accept it or refuse it; they never fail, and never grow."""

import gc
import os
import time
from collections.abc import Iterator
from random import Random

import psutil
import pytest
from fuzz_inputs import CORPUS, decode, encode, stories
from fuzz_mutations import mutated
from fuzz_target import Peer, small

HONEST = {"headers", "terms", "model", "models", "streams", "broken", "broken-stream", "credit"}
HONEST |= {"staying", "broken-staying"}
SEEDS = {path.name: decode(path.read_bytes()) for path in sorted(CORPUS.iterdir())}
GROWTH = 16 << 20  # bytes that may be due to Python and its allocator


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with small():
        yield


def test_the_corpus_is_what_it_was_made_of():
    assert stories() == SEEDS


@pytest.mark.parametrize("name", SEEDS)
def test_honest_stories_are_accepted_and_the_others_refused(name: str):
    peer = Peer()
    peer.play(SEEDS[name])
    assert peer.accepted + peer.refused == len(SEEDS[name])
    assert (peer.refused == 0) == (name in HONEST)


def fuzz(seed: int, count: int) -> tuple[int, int, float]:
    """Play so many mutated stories; return what was accepted and refused, and the seconds."""
    draw, seeds = Random(seed), list(SEEDS.values())
    accepted = refused = 0
    story = seeds[0]
    started = time.perf_counter()
    for _ in range(count):
        # Mostly one more change to the last story, so that changes add up.
        story = mutated(story if draw.random() < 0.7 else draw.choice(seeds), draw, seeds)
        if sum(len(frame) for _, frames in story for frame in frames) > 4096:
            story = draw.choice(seeds)
        peer = Peer()
        try:
            peer.play(story)
        except Exception as error:
            raise AssertionError(f"after seed {seed}: {encode(story)!r}") from error
        accepted += peer.accepted
        refused += peer.refused
    return accepted, refused, time.perf_counter() - started


def rss() -> int:
    gc.collect()
    return int(psutil.Process(os.getpid()).memory_info().rss)


def run(count: int) -> float:
    fuzz(0, 2000)  # caches fill up
    before = rss()
    accepted, refused, took = fuzz(1, count)
    assert rss() - before < GROWTH
    assert accepted > count / 2  # it gets beyond the first check
    assert refused > count / 2
    return count / took


def test_frames_changed_on_the_way_do_no_harm():
    run(50_000)  # of two changes each on average


@pytest.mark.slow
def test_a_million_stories_do_no_harm(capsys):
    rate = run(1_000_000)
    with capsys.disabled():
        print(f"\n{rate:,.0f} mutated stories per second")
