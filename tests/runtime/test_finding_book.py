"""What peers tell each other about where the others listen, and how much of it is believed."""

import msgpack
import pytest
from links_cases import TERMS, meet

from p2pfl.errors import RemoteProtocolError
from p2pfl.runtime import finding, wire
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import ENTRY, MOST_ADDRESS, MOST_TOLD, Book
from p2pfl.runtime.links import Links


def address(number: int) -> str:
    return f"tcp://10.0.0.{number}:7000"


def body(*frames: object) -> list[memoryview]:
    return [memoryview(msgpack.packb(frame)) for frame in frames]


def test_the_newest_is_kept_but_what_is_certain_stays():
    book = Book(3, {0: address(1)})
    book.learn({0: address(9), 1: address(2), 2: address(3)})
    book.learn({2: address(4)})
    assert book.addresses == {0: address(1), 1: address(2), 2: address(4)}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({3: address(1)}, "an address of peer 3, who takes no part"),
        ({-1: address(1)}, "an address of peer -1, who takes no part"),
        ({1: ""}, "an address which is none"),
        ({1: "ipc:///tmp/x"}, "an address which is none"),
        ({1: "tcp://" + "x" * MOST_ADDRESS}, "an address which is none"),
        ({1: "tcp://" + "x" * MOST_ADDRESS + ":7000"}, "an address which is none"),
        ({1: "tcp://[x]:7000"}, "an address which is none"),
        ({1: "tcp://10.0.0.1:99999"}, "an address which is none"),
    ],
)
def test_what_cannot_be_is_refused(told: dict[int, str], why: str):
    book = Book(3, {0: address(1)})
    with pytest.raises(RemoteProtocolError, match=why):
        book.learn(told)
    assert book.addresses == {0: address(1)}


def test_a_full_book_still_fits_one_message_and_can_be_corrected():
    book, long = Book(4000, {}), "tcp://" + "x" * (MOST_ADDRESS - 11) + ":7000"
    for peer in range(MOST_TOLD // (MOST_ADDRESS + ENTRY)):
        book.learn({peer: long})
    with pytest.raises(RemoteProtocolError, match="more addresses than a book holds"):
        book.learn({3999: long})
    assert len(book.pack()) < wire.MAX_HELLO
    book.learn({0: address(1), 3999: address(2)})
    assert finding.unpack([memoryview(book.pack())]) == book.addresses


def test_of_a_list_that_is_too_long_some_is_told():
    book = Book(4000, {peer: address(peer + 1) for peer in range(4000)})
    told = finding.unpack([memoryview(book.pack())])
    assert 1000 < len(told) < 4000
    assert told.items() <= book.addresses.items()


def test_addresses_survive_the_journey():
    told = {0: address(1), 12: address(2)}
    assert finding.unpack([memoryview(finding.pack(told))]) == told
    assert finding.unpack([memoryview(finding.pack({}))]) == {}


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([], "a message without addresses"),
        (body({}, {}), "a message without addresses"),
        (body([]), "malformed hello"),
        (body({"0": 1}), "malformed hello"),
        (body({0: "tcp://x"}), "malformed hello|not a message of this protocol"),
        (body({"-1": "tcp://x"}), "addresses of nobody"),
        (body({"": "tcp://x"}), "addresses of nobody"),
        (body({"١": "tcp://x"}), "addresses of nobody"),
        (body({"9" * 10: "tcp://x"}), "addresses of nobody"),
        (body("x" * wire.MAX_HELLO), "a hello of"),
        ([memoryview(b"\xdf\xff\xff\xff\xff")], "not a message of this protocol"),
        ([memoryview(b"\xc1")], "not a message of this protocol"),
    ],
)
def test_what_is_no_book_is_refused(frames: list[memoryview], why: str):
    with pytest.raises(RemoteProtocolError, match=why):
        finding.unpack(frames)


def test_nobody_is_asked_any_more_once_all_have_met():
    """What a contact says later would wake a loop that does not read it, for ever."""
    ends = [Endpoint("tcp://127.0.0.1:*", 2) for _ in range(2)]
    books = [Book(2, {me: end.listener.address}) for me, end in enumerate(ends)]
    where = (0, ends[0].listener.address)
    asking = finding.ask(ends[1], where, 1, books[1], TERMS.run)
    peers = [
        Links(me, end, [1 - me], TERMS, book, asking if me else None)
        for me, (end, book) in enumerate(zip(ends, books, strict=True))
    ]
    try:
        meet(*peers)
        assert len(ends[1]._links) == 1
    finally:
        for links in peers:
            links.close("the test is over", 0)
