"""The mixture as a function of (seed, k): one set a draw, shares kept at any k, every record once a pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformer import cards
from qformer.data.mixture import Mixture
from qformer.errors import ConfigError

SIZES = {"coco": 566_747, "web": 13_873_136, "okvqa": 9_009, "llava": 23_240, "tiny": 7}


def mixture(seed=0, records=None):
    records = records or {name: min(size, 50) for name, size in SIZES.items()}
    return Mixture(cards.probabilities(SIZES, {}), records, seed)


def test_every_draw_has_exactly_one_set_and_is_its_next():
    drawn = dict.fromkeys(SIZES, 0)
    whole = mixture()
    for number in range(5000):
        before, after = whole.totals(number), whole.totals(number + 1)
        risen = [name for name in SIZES if after[name] != before[name]]
        draw = whole.draw(number)
        assert risen == [draw.task] and after[draw.task] == before[draw.task] + 1
        assert divmod(drawn[draw.task], whole.records[draw.task])[0] == draw.turn
        drawn[draw.task] += 1
    assert drawn == whole.totals(5000)


@pytest.mark.parametrize("count", [1, 10, 999, 12_345, 11_520_000, 10**12])
def test_shares_stay_within_two_of_their_due(count):
    shares = cards.probabilities(SIZES, {})
    totals = mixture().totals(count)
    assert sum(totals.values()) == count
    assert all(abs(totals[name] - count * shares[name]) <= 2 for name in SIZES if count < 10**9)
    assert all(abs(totals[name] / count - shares[name]) < 1e-6 for name in SIZES if count >= 10**9)


@given(
    sizes=st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 20_000_000), min_size=1, max_size=13
    ),
    sampling=st.sampled_from(["sqrt", "proportional", "uniform"]),
    count=st.integers(0, 10**7),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_shares_of_any_mixture_stay_within_two_of_their_due_at_any_k(sizes, sampling, count):
    shares = cards.probabilities(sizes, {}, sampling)
    whole = Mixture(shares, dict.fromkeys(sizes, 50), seed=0)
    before, after = whole.totals(count), whole.totals(count + 1)
    assert sum(before.values()) == count
    assert all(abs(before[name] - count * shares[name]) <= 2 for name in sizes)
    assert sorted(after[name] - before[name] for name in sizes) == [0] * (len(sizes) - 1) + [1]
    assert after[whole.draw(count).task] == before[whole.draw(count).task] + 1


def test_every_record_once_a_pass():
    whole = mixture()
    seen = {}
    for number in range(3000):
        draw = whole.draw(number)
        seen.setdefault((draw.task, draw.turn), []).append(draw.place)
    for (task, turn), places in seen.items():
        assert len(set(places)) == len(places)
        if (task, turn + 1) in seen:
            assert sorted(places) == list(range(whole.records[task]))


def test_passes_and_seeds_have_orders_of_their_own():
    def first_pass(seed, turn):
        whole = Mixture({"one": 1.0}, {"one": 20}, seed)
        return [whole.draw(20 * turn + place).place for place in range(20)]

    assert first_pass(0, 0) != first_pass(0, 1)
    assert first_pass(0, 0) != first_pass(1, 0)
    assert first_pass(3, 2) == first_pass(3, 2)


def test_published_shares_of_the_thirteen_sets():
    """Variant A of the published sizes, to four digits; COCO Caption, VQAv2 and OCR-VQA among them."""
    sizes = {
        "coco": 566_747, "web": 13_873_136, "textcaps": 109_765, "vqav2": 443_757, "okvqa": 9_009, "aokvqa": 17_056,
        "ocrvqa": 801_673, "vqg_vqav2": 443_757, "vqg_okvqa": 9_009, "vqg_aokvqa": 17_056,
        "conversation": 56_681, "detail": 23_240, "reasoning": 76_643,
    }  # fmt: skip
    shares = cards.probabilities(sizes, {})
    assert shares["coco"] == pytest.approx(0.092316, abs=5e-7)
    assert shares["web"] == pytest.approx(0.456742, abs=5e-7)
    assert shares["ocrvqa"] == pytest.approx(0.109795, abs=5e-7)
    assert shares["detail"] == pytest.approx(0.018694, abs=5e-7)


def test_multipliers_and_other_samplings():
    assert cards.probabilities({"a": 4, "b": 1}, {"b": 2.0}) == pytest.approx({"a": 0.5, "b": 0.5})
    assert cards.probabilities({"a": 3, "b": 1}, {}, "proportional") == pytest.approx({"a": 0.75, "b": 0.25})
    assert cards.probabilities({"a": 3, "b": 1}, {}, "uniform") == pytest.approx({"a": 0.5, "b": 0.5})


def test_a_far_draw_costs_no_more_than_a_near_one():
    whole = Mixture({"web": 1.0}, {"web": 25_000_000}, 0)
    assert 0 <= whole.draw(10**15).place < 25_000_000


def test_a_set_without_share_is_left_out():
    assert Mixture({"a": 1.0, "b": 0.0}, {"a": 3, "b": 3}, 0).names == ["a"]


def test_errors_name_the_set():
    with pytest.raises(ConfigError, match="'b' has no records"):
        Mixture({"a": 0.5, "b": 0.5}, {"a": 3, "b": 0}, 0)
    with pytest.raises(ConfigError, match="at least one"):
        Mixture({}, {}, 0)
