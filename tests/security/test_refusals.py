"""Who invents reasons of refusal hides only its own."""

from p2pfl.security.refusals import MOST_REASONS, MOST_SOURCES, Refusals


def test_each_source_has_a_list_of_its_own():
    found = Refusals()
    for number in range(3 * MOST_REASONS):
        found.note("peer 2", f"peer 2: nonsense {number}")
    found.note("peer 1", "peer 1: a chunk nobody has asked for")
    assert found["peer 1: a chunk nobody has asked for"] == 1
    assert found["peer 2: other reasons"] == 2 * MOST_REASONS
    assert len(found) == MOST_REASONS + 2
    found.note("peer 2", "peer 2: nonsense 0")
    assert found["peer 2: nonsense 0"] == 2  # what is listed goes on being counted


def test_any_number_of_sources_takes_no_more_memory():
    found = Refusals()
    for number in range(3 * MOST_SOURCES):
        found.note(f"host {number}", f"host {number}: too many messages")
    assert len(found) == MOST_SOURCES + 1
    assert found["other reasons"] == 2 * MOST_SOURCES
    assert len(found._told_apart) == MOST_SOURCES
