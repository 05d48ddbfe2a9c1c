import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarto.cluster.text.stop_strings import StopMatcher


def feed(stops, pieces, include=False):
    """The text of all deltas, the match, and the deltas themselves."""
    matcher = StopMatcher(stops, include)
    deltas, matched = [], None
    for piece in pieces:
        emit, matched = matcher.push(piece)
        deltas.append(emit)
        if matched is not None:
            break
    if matched is None:
        emit, matched = matcher.flush()
        deltas.append(emit)
    return "".join(deltas), matched, deltas


def naive(stops, text, include=False):
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, length, stop = min(found)
    return text[: start + length if include else start], stop


@st.composite
def cases(draw):
    # A tiny alphabet makes overlaps, borders and repeated beginnings common.
    stops = draw(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
    text = draw(st.text("abc", max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return stops, text, pieces


@given(cases(), st.booleans())
def test_result_is_that_of_a_search_over_the_whole_text_however_it_is_cut(case, include):
    stops, text, pieces = case
    out, matched, _ = feed(stops, pieces, include)
    assert (out, matched) == naive(stops, text, include)


@given(cases())
def test_no_part_of_a_stop_string_ever_leaves(case):
    stops, text, pieces = case
    expected, _ = naive(stops, text)
    _, _, deltas = feed(stops, pieces)
    assert expected.startswith("".join(deltas[:-1]))


def test_stop_string_is_found_across_deltas():
    assert feed(["\n\nHuman:"], ["Sure.\n", "\nHu", "man", ": hi"])[:2] == ("Sure.", "\n\nHuman:")


def test_beginning_of_a_stop_string_is_given_out_once_it_fails():
    matcher = StopMatcher(["END"], False)
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.push("D") == ("", "END")
    matcher = StopMatcher(["END"], False)
    matcher.push("the EN")
    assert matcher.push("S") == ("ENS", None)


def test_flush_gives_out_what_was_held_back():
    matcher = StopMatcher(["END"], False)
    matcher.push("EN")
    assert matcher.flush() == ("EN", None)


def test_text_is_complete_up_to_the_matched_string_when_included():
    assert feed(["END"], ["a E", "ND b"], include=True)[:2] == ("a END", "END")


def test_inner_stop_string_waits_for_the_outer_one():
    matcher = StopMatcher(["abcd", "bc"], False)
    assert matcher.push("xabc") == ("x", None)
    assert matcher.flush() == ("a", "bc")


def test_what_follows_a_match_is_dropped():
    matcher = StopMatcher(["."], False)
    assert matcher.push("a. b") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.flush() == ("", ".")


def test_without_stop_strings_text_passes_through():
    assert StopMatcher([], False).push("abc") == ("abc", None)


@pytest.mark.parametrize("stop", ["a" * 2000 + "b", "ab" * 1000 + "c"])
def test_repetitive_text_stays_linear(stop):
    matcher = StopMatcher([stop], False)
    start = time.perf_counter()
    for _ in range(20_000):
        matcher.push(stop[0] * 4)
    assert time.perf_counter() - start < 5
