"""Values that look alike and are not: other units, names and marks; and other spellings that say the same."""

import pytest

from rlcs.rewards import kit, verify

pytestmark = pytest.mark.long


def check(expect, domain, answer, truth, question=None):
    verdict = verify(domain, kit.respond(answer), truth, question)
    assert (verdict.outcome, verdict.score) == (("score", 1) if expect else ("wrong", 0)), verdict.detail


@pytest.mark.parametrize(
    ("expect", "answer", "truth"),
    [
        (0, "5 Ym^12*Zm^14/m^25", "5 m"), (0, "3 B", "3 dB"), (0, "1 W", "30 dBm"), (0, "3859.5 dBm", "1 W"),
        (1, "1 Np", "8.686 dB"), (1, "32 °F", "0 °C"), (1, "300 K", "26.85 °C"),
    ],
)  # fmt: skip
def test_units_that_no_factor_turns_into_one_another(expect, answer, truth):
    """No match and no error: an answer may not choose an error, which is masked, over a zero."""
    check(expect, "physics", answer, truth)
