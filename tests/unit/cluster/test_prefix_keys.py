"""Keys of cached blocks: equal exactly where prefixes, salts and secrets are."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space.prefix_keys import KEY_BYTES, PrefixKeys

SIZE = 8
TOKENS = list(range(100, 140))


def keys_of(tokens, *, num_tokens=None, salt="", secret=b"s" * 16, size=SIZE):
    made, keys = PrefixKeys(secret, size), []
    made.extend(keys, made.root(salt), tokens, len(tokens) if num_tokens is None else num_tokens)
    return keys


def changed(index, token=7):
    return [*TOKENS[:index], token, *TOKENS[index + 1:]]


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (7, 0), (8, 1), (15, 1), (40, 5)])
def test_full_blocks_have_keys(num_tokens, num_keys):
    assert len(keys_of(TOKENS, num_tokens=num_tokens)) == num_keys


def test_keys_have_128_bits():
    assert {len(key) for key in keys_of(TOKENS)} == {KEY_BYTES} == {16}


def test_equal_prefixes_have_equal_keys():
    assert keys_of(TOKENS) == keys_of(list(TOKENS))


@pytest.mark.parametrize(("index", "num_equal"), [(39, 4), (16, 2), (15, 1), (0, 0)])
def test_keys_differ_from_the_block_with_the_first_other_token_on(index, num_equal):
    pairs = list(zip(keys_of(TOKENS), keys_of(changed(index)), strict=True))
    assert [one == other for one, other in pairs] == [True] * num_equal + [False] * (5 - num_equal)


def test_equal_blocks_after_different_prefixes_have_different_keys():
    keys = keys_of([1] * 40)
    assert len(set(keys)) == 5


def test_the_order_of_tokens_counts():
    assert keys_of([1, 2] * 4) != keys_of([2, 1] * 4)


def test_the_order_of_blocks_counts():
    assert keys_of([1] * 8 + [2] * 8)[1] != keys_of([2] * 8 + [1] * 8)[1]


@pytest.mark.parametrize("token", [256, 2**16, 2**31, 2**32 - 1])
def test_every_bit_of_a_token_counts(token):
    assert keys_of(changed(0, token))[0] != keys_of(changed(0, 0))[0]


@pytest.mark.parametrize(("one", "other"), [("", "a"), ("a", "b"), ("a", "a "), ("ä", "a"), ("\udc80", "\udc81")])
def test_another_salt_sets_every_key_apart(one, other):
    assert not set(keys_of(TOKENS, salt=one)) & set(keys_of(TOKENS, salt=other))


def test_another_secret_sets_every_key_apart():
    assert not set(keys_of(TOKENS, secret=b"t" * 16)) & set(keys_of(TOKENS))


def test_without_the_secret_the_keys_cannot_be_guessed():
    assert not set(keys_of(TOKENS, secret=b"")) & set(keys_of(TOKENS))


def test_keys_that_are_there_are_kept_and_continued():
    made = PrefixKeys(b"s" * 16, SIZE)
    keys = keys_of(TOKENS, num_tokens=17)
    made.extend(keys, b"never looked at", TOKENS, 40)
    assert keys == keys_of(TOKENS)


def test_keys_that_are_there_are_not_shortened():
    made, keys = PrefixKeys(b"s" * 16, SIZE), keys_of(TOKENS)
    made.extend(keys, made.root(""), TOKENS, 8)
    assert len(keys) == 5


def test_a_lone_surrogate_in_a_salt_is_no_error():
    assert PrefixKeys(b"s" * 16, SIZE).root("\udc80") != PrefixKeys(b"s" * 16, SIZE).root("")
