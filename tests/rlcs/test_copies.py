"""Answers that leave the question's work undone, and those that only look so."""

import pytest

from rlcs.rewards import kit, verify

pytestmark = pytest.mark.long


def check(expect, domain, answer, truth, question=None):
    verdict = verify(domain, kit.respond(answer), truth, question)
    assert (verdict.outcome, verdict.score) == (("score", 1) if expect else ("wrong", 0)), verdict.detail


@pytest.mark.parametrize(
    ("answer", "truth", "question"),
    [
        ("2^{10}", "1024", "计算2^{10}的值"), ("36 km/h", "10 m/s", "将36km/h换算为m/s"),
        ("x^2-1", "(x+1)(x-1)", "因式分解x^2-1"), ("\\sqrt{12}", "2\\sqrt{3}", "化简\\sqrt{12}"),
        ("(x+1)^2", "x^2+2x+1", "展开(x+1)^2"), ("36 km/h", "10 m/s", "36km/h等于多少m/s？"),
    ],
)  # fmt: skip
def test_a_copy_beside_chinese_text(answer, truth, question):
    check(0, "math", answer, truth, question)


@pytest.mark.parametrize(
    ("answer", "truth", "question"),
    [
        ("3/4", "0.75", "Write 3/4 as a decimal."), ("7/8", "0.875", "What is 7/8 as a decimal?"),
        ("x = 3/4", "0.75", "Write 3/4 as a decimal."), ("6/8", "0.75", "What is 6/8?"),
        ("7/4", "1 3/4", "Change 7/4 to a mixed number."), ("36 km/h", "10 m/s", "What is 36 km/h in m/s?"),
        ("36 km/h", "10", "What is 36 km/h in m/s?"),
        ("72", "2^3 \\cdot 3^2", "Find the prime factorization of 72."),
        ("150000000", "1.5 \\times 10^8", "Express 150000000 in scientific notation."),
        ("3x+2x", "5x", "What is 3x + 2x?"), ("(x+1)(x+2)", "x^2+3x+2", "Multiply (x+1)(x+2)"),
        ("(x+1)^2", "x^2+2x+1", "What is $(x+1)^2$?"), ("2x+y=3", "y = 3 - 2x", "Take $2x+y=3$ for y."),
    ],
)  # fmt: skip
def test_a_copy_whatever_the_verb(answer, truth, question):
    check(0, "math", answer, truth, question)


@pytest.mark.parametrize(
    ("answer", "truth", "question"),
    [
        ("(x+2)(x+1)", "x^2+3x+2", "Expand (x+1)(x+2)"), ("(x+2)(x+1)", "x^2+3x+2", "Multiply $(x+1)(x+2)$."),
        ("2+3x+x^2", "(x+1)(x+2)", "Factor x^2+3x+2"), ("9/12", "3/4", "Write 6/8 in lowest terms"),
        ("1 4/6", "1\\frac{2}{3}", "Simplify 20/12."),
    ],
)  # fmt: skip
def test_a_copy_in_another_order_is_as_undone(answer, truth, question):
    check(0, "math", answer, truth, question)


GAS = "A gas expands from V_1 to V_2 at pressure P. What work does it do?"


@pytest.mark.parametrize(
    ("domain", "answer", "truth", "question"),
    [
        ("math", "(x+2)(x+1)", "(x+1)(x+2)", "Factor x^2+3x+2"), ("math", "3x+x^2+2", "x^2+3x+2", "Expand (x+1)(x+2)"),
        ("math", "\\frac{x^2+1}{2}", "\\frac{x^2}{2}+\\frac{1}{2}", "Expand $\\frac12(x^2+1)$"),
        ("math", "3/4", "0.75", "A tank is 3/4 full. How full is it?"),
        ("math", "5", "\\sqrt{25}", "Calculate x when y = 5."), ("math", "0.75", "3/4", "Write 6/8 in lowest terms"),
        ("math", "3 \\times 2^3 \\times 3", "2^3 \\cdot 3^2", "Find the prime factorization of 72."),
        ("math", "y=2x+3", "y = 3+2x", "Where is the line y=2x+3?"), ("math", "8", "2^3", "求最大公因数"),
        ("physics", "36 km/h", "10 m/s", "A car moves at 36 km/h in a straight line. How fast is it after 3 s?"),
        ("physics", "P(V_2-V_1)", "PV_2-PV_1", GAS),
        ("physics", "36 km/h", "10 m/s", "速度为36km/h的汽车，速度是多少？"),
        ("chemistry", "2H2+O2->2H2O", "2H_2 + O_2 \\rightarrow 2H_2O", "Is 2H2+O2->2H2O the reaction? Write it."),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_copy(domain, answer, truth, question):
    check(1, domain, answer, truth, question)
