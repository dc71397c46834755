"""Keyed choices: held still by golden values, even in spread, permutations whole."""

import pytest

from qformer import keyed

GOLDEN = (0x4F2C32B91CA92B6D, 0xAD4650119BE4D2B9, 5, [3, 2, 0, 1, 4])


def test_hash_is_held_by_golden_values():
    assert keyed.keyed_hash() == 0xCBF29CE484222325
    assert keyed.keyed_hash(0, "vqav2", "42", 0) == GOLDEN[0]
    assert keyed.keyed_hash("ab", "c") == GOLDEN[1]
    assert keyed.permute(3, 10, 7, "set", 0) == GOLDEN[2]
    assert [keyed.permute(place, 5, 1) for place in range(5)] == GOLDEN[3]


def test_parts_do_not_run_together():
    assert keyed.keyed_hash("ab", "c") != keyed.keyed_hash("a", "bc")
    assert keyed.keyed_hash(1, 2) != keyed.keyed_hash(2, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1023])
def test_permutation_takes_every_place_once(size):
    assert sorted(keyed.permute(place, size, "key") for place in range(size)) == list(range(size))


def test_permutations_of_different_keys_differ():
    first = [keyed.permute(place, 50, 0) for place in range(50)]
    assert first != [keyed.permute(place, 50, 1) for place in range(50)]
    assert first != list(range(50))


def test_permutation_spreads_first_places_evenly():
    """Where place 0 of 10 lands, over 4,000 keys: every tenth within five standard deviations of 400."""
    counts = [0] * 10
    for key in range(4000):
        counts[keyed.permute(0, 10, key)] += 1
    assert max(abs(count - 400) for count in counts) < 5 * (4000 * 0.1 * 0.9) ** 0.5


def test_choices_are_even():
    counts = [0] * 6
    for number in range(6000):
        counts[keyed.below(6, "die", number)] += 1
    assert max(abs(count - 1000) for count in counts) < 5 * (6000 / 6 * 5 / 6) ** 0.5


def test_a_place_outside_is_refused():
    with pytest.raises(ValueError, match="not in range"):
        keyed.permute(5, 5, "key")
