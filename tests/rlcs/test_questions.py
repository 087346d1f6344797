"""Verdicts that depend on the question: its options and names, the order and the form that it asks for."""

import pytest

from rlcs.rewards import kit, verify
from rlcs.rewards.choice import options_of

pytestmark = pytest.mark.long


def score(domain, answer, truth, question):
    verdict = verify(domain, kit.respond(answer), truth, question)
    assert verdict.outcome != "error", verdict.detail
    return verdict.score


OHM = "A current I flows through a resistor R. What is the voltage across it?"
TANK = "A block of mass $m$ falls by h under gravity g within a time t. Give the product."
RANK = "Rank the currents I, J and K through the bulbs, the largest first."


@pytest.mark.parametrize(
    ("expect", "answer", "truth", "question"),
    [
        (1, "RI", "IR", OHM), (1, "V=RI", "V=IR", None), (1, "RI", "V=IR", None), (1, "R I", "IR", OHM),
        (0, "IV", "IR", OHM), (0, "IRR", "IR", OHM), (1, "tghm", "mght", TANK), (1, "mh gt", "mght", TANK),
        (0, "mghh", "mght", TANK), (0, "RI", "IR", None), (0, "KJI", "IJK", RANK), (0, "mali", "lima", OHM),
        (0, "BA", "AB", "The points A and B move. Which comes first?"), (0, "mali", "lima", TANK),
        (1, "RI", "IR", "电流I流过电阻R, 求电压"), (0, "CAT", "TAC", "A pairs with T, G with C. What pairs with ATG?"),
        (1, "AP", "PA", "What force does a pressure P on an area A make?"),
        (1, "mgdμ", "μmgd", None), (1, "mg\\sin\\theta", "mgsinθ", None), (0, "mgcosθ", "mgsinθ", None),
    ],
)  # fmt: skip
def test_products_of_letters_have_no_order(expect, answer, truth, question):
    assert score("physics", answer, truth, question) == expect


COLOURS = "Which colour?\nA. red\nB. blue"
RIGHTS = "Which are right?\nA. I and II\nB. II only"
VALUES = "What is it?\nA. 1/2\nB. yes"


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (1, "choice", "A", "A. red", COLOURS), (1, "choice", "red", "A. red", COLOURS),
        (0, "choice", "B", "A. red", COLOURS),
        (1, "choice", "Option B: blue", "B", COLOURS), (1, "choice", "I and II", "A", RIGHTS),
        (0, "choice", "I", "A", RIGHTS),
        (1, "choice", "B", "yes", VALUES), (0, "choice", "A", "yes", VALUES), (1, "math", "A", "1/2", VALUES),
        (0, "math", "A, B", "1/2", VALUES), (1, "math", "0.5", "1/2", VALUES), (0, "math", "B", "1/2", VALUES),
        (1, "chart", "A", "1/2", VALUES),
    ],
)  # fmt: skip
def test_a_truth_may_be_an_option_s_text(expect, domain, answer, truth, question):
    assert score(domain, answer, truth, question) == expect


BOLD = "What is it?\n**A.** a cat\n**B.** a dog"
BOLD_LINES = "What is it?\n- **A. a cat**\n- **B. a dog**"
BRACKETS, SMALL = "What is it?\n[A] a cat\n[B] a dog", "What is it?\na) a cat\nb) a dog"
PARTS = "Let n be 4.\n(a) Is n even?\n(b) Is n prime?"


@pytest.mark.parametrize("domain", ["choice", "vqa", "math"])
@pytest.mark.parametrize("question", [BOLD, BOLD_LINES, BRACKETS, SMALL])
def test_how_options_are_listed(question, domain):
    for truth in ("B", "b", "a dog"):
        for expect, answers in (
            (1, ("a dog", "B", "b", "(b)", "[B]", "b) a dog", "B. a dog")),
            (0, ("a cat", "A", "a")),
        ):
            for answer in answers:
                assert score(domain, answer, truth, question) == expect, (answer, truth)


def test_what_is_no_list_of_options():
    assert options_of(PARTS) == options_of("b) red\nc) blue") == options_of("a) red") == {}
    assert options_of("What is [A] where\n[B] is 0.2 M?") == options_of("Give 2 **A** 3.") == {}
    assert score("math", "Yes, it is even", "Yes", PARTS) == 1


def test_a_name_of_the_question_is_no_unit():
    assert score("math", "5", "5abc", "Let a, b and c be the sides.") == 0
    assert score("math", "5x", "5", "Find x.") == 0
    assert score("math", "5 apples", "5", "How many apples?") == 1


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (0, "math", "\\sqrt{18}", "3\\sqrt{2}", "Simplify $\\sqrt{18}$."),
        (1, "math", "3√2", "3\\sqrt{2}", "Simplify $\\sqrt{18}$."),
        (0, "math", "(x+1)(x-1)", "x^2-1", "Expand $(x+1)(x-1)$."),
        (0, "math", "x^2 - 1", "(x-1)(x+1)", "Factor $x^2-1$."), (0, "math", "2x+3x", "5x", "Simplify 2x+3x"),
        (0, "math", "a^2-b^2", "(a+b)(a-b)", "分解因式：a²-b²"),
        (1, "math", "x^2+1", "x^{2}+1", "Let f(x)=x^2+1. Calculate f(-x)."),
        (1, "math", "(x+1)(x-1)", "x^2-1", "Which product has the roots 1 and -1?"),
        (0, "math", "2, 3/4, 5/6", "3/4, 5/6, 2", "Arrange 2, 3/4, 5/6 in increasing order"),
        (1, "math", "3/4, 5/6, 2", "3/4, 5/6, 2", "Arrange 2, 3/4, 5/6 in increasing order"),
        (0, "physics", "C, B, A", "B, C, A", "Rank A, B and C, the largest first."),
        (1, "physics", "B,C,A", "B, C, A", "Rank A, B and C, the largest first."),
        (1, "math", "2, -2", "-2, 2", "Find all x, in any order."),
        (1, "math", "2, -2", "-2, 2", "In order to bound the sequence, find x."),
        (0, "math", "48/64", "3/4", "Reduce 48/64 to lowest terms."),
        (0, "math", "3/4", "0.75", "Convert 3/4 to a decimal."),
        (0, "physics", "36 km/h", "10 m/s", "Convert 36 km/h to m/s."), (1, "math", "60", "60\\%", "What percent?"),
        (1, "math", "2", "2.0", "Convert 2 dozen to scores, 12 to 1."),
        (1, "math", "60%", "60", "What percentage?"), (0, "math", "0.5%", "0.5", "What percent?"),
        (0, "math", "60", "0.6", "What percent?"), (1, "vqa", "12", "12%", "What percentage is shown?"),
        (0, "vqa", "1.2%", "12", "What % is it?"), (0, "vqa", "12", "12%", None),
        (0, "geography", "1945", "1939", "In which year did it begin?"),
        (1, "physics", "1205", "1200", "What is the pressure in Pa?"),
        (1, "choice", "15", "B", "How long is it? A:5 B:15 C:25"),
        (0, "choice", "A. B. C. D.", "A", "A. red\nB. blue"),
        (1, "choice", "A cat", "B", "What is it?\nA. dog\nB. A cat"),
    ],
)  # fmt: skip
def test_form_order_and_unit_that_a_question_asks_for(expect, domain, answer, truth, question):
    """What it gives to be rewritten is no answer; ranks have an order; years are exact; per cent may go unsaid."""
    assert score(domain, answer, truth, question) == expect


SPEED, DOLLARS = "Find the speed in meters per second.", "How many dollars?"
DROP = "The height of a ball, in feet, is 96 - 16t^2. When does it land?"


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (0, "physics", "10 cm", "10", "Find the length in m."),
        (1, "physics", "5", "5 cm", "Find the length in cm."), (0, "physics", "5", "5 cm", "Find the length in m."),
        (0, "physics", "0.05", "5 cm", "Find the length in m."), (0, "physics", "5", "5 cm", "Find the length."),
        (1, "physics", "1000 cm", "10", "Find the length in m."),
        (0, "physics", "5 mV", "5", "Find the voltage in V."), (1, "physics", "5000 mV", "5", "Find the voltage in V."),
        (0, "physics", "5 mA", "5", "What is the current through R in A?"),
        (1, "physics", "5 mA", "5", "Which of the values is in A?"),
        (0, "physics", "300 °C", "300", "Find the temperature in K."), (0, "physics", "1000 cm", "10", SPEED),
        (0, "physics", "10 meters", "10", SPEED),
        (1, "physics", "36 km/h", "10", SPEED), (1, "physics", "10", "10", SPEED),
        (0, "physics", "9.8 cm/s²", "9.8", "Find the acceleration in m/s²."),
        (1, "physics", "980 cm/s^2", "9.8", "Find the acceleration in m/s^2."),
        (0, "physics", "9.8 cm/s^2", "9.8", "Give it in units of m/s^2."),
        (1, "math", "2 liters", "2", "How many liters per 100 km does it use?"),
        (1, "physics", "14.7 psi", "14.7", "Find the pressure in pounds per square inch."),
        (0, "physics", "5 kg", "5", "Find the length in meters."),
        (0, "math", "24 cm", "24", "Find the area in square meters."),
        (0, "math", "5\\sqrt{2} cm", "5\\sqrt{2}", "Find the length in m."), (0, "math", "3 cents", "3", DOLLARS),
        (1, "math", "$3", "3", DOLLARS), (1, "math", "$3/hour", "3", "How many dollars does he earn each hour?"),
        (1, "math", "£5", "5", "What is the price in pounds?"), (1, "vqa", "30 °C", "30", "How many degrees is it?"),
        (0, "math", "98 °C", "98", "What is it in degrees Fahrenheit?"), (1, "math", "5 s", "5", DROP),
        (1, "math", "5 s", "5", "If the height in feet is 96 - 16t^2, when does it land?"),
        (1, "math", "5 people", "5", "How many in all?"), (1, "math", "5 people", "5", "How many won a medal?"),
        (1, "math", "$500", "500", "What was the profit in year 2000?"),
        (0, "vqa", "5 kg", "5", "How tall in meters?"), (1, "vqa", "5 ft/s", "5", "How fast in feet per second?"),
        (0, "chart", "10 g", "10", "Weight in kg?"), (1, "chart", "10 kg", "10", "Weight in kg?"),
        (1, "chart", "10 m", "10", "Height in m?"),
    ],
)  # fmt: skip
def test_a_unit_that_only_the_question_names(expect, domain, answer, truth, question):
    """It is the truth's: another one is converted or wrong, and none is right."""
    assert score(domain, answer, truth, question) == expect


METERS, MILLIONS = "How far is it, in meters?", "What was the profit in million euros?"
FRACTION = "Which one? A. 3/4 B. 2/3 C. 1/2"
PRICE = "What is the price? (A) $1.50 (B) $2.50 (C) $3.50"
POWERS = "Which one?\nA. $2^n+1$\nB. $2^{n+1}$\nC. $2n+1$"
ROOTS = "Which one?\nA. $\\sqrt{2}x$\nB. $\\sqrt{2x}$\nC. $\\frac{x}{2}$"
FORCES = "Which one?\nA. mgR/r\nB. mgr/R\nC. m-g\nD. $mg$"
ANIMALS = "What is it?\nA. X-ray\nB. Dog (red)\nC. rises by $x^2$"
STATED = "正确的是？\nA. ①③\nB. ①②\nC. ②③"
LAMPS = "Which lamp is the brightest? (A) P (B) Q (C) R"


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (1, "math", "540 m", "540", METERS), (0, "math", "540 km", "540", METERS),
        (1, "math", "0.54 km", "540", METERS),
        (1, "spatial", "250 cm", "2.5", METERS), (0, "spatial", "2.5 cm", "2.5", METERS),
        (1, "vqa", "5 m", "5", "How many people came, and how far?"),
        (1, "math", "90 min", "90", "How many minutes does she run?"),
        (0, "math", "90 s", "90", "How many minutes is it?"),
        (0, "geography", "1981", "1980", "Year of the eruption?"),
        (1, "math", "5 km", "5", "She came in second, after 5 km. How far was it?"),
        (1, "chart", "312", "312 million", MILLIONS), (0, "chart", "312", "312 million", None),
        (1, "chart", "312 million", "312", MILLIONS), (0, "chart", "312 billion", "312", MILLIONS),
        (0, "chart", "312 million", "312", None), (0, "chart", "1985 million", "1985", None),
        (0, "chart", "$1,500 million", "1500", None), (0, "chart", "2.001 thousand", "2000", None),
        (1, "chart", "1.5 thousand", "1500", None), (1, "chart", "1200 thousand", "1200", "How many thousand?"),
        (0, "chart", "1985 BC", "1985", None), (1, "chart", "1985 AD", "1985", None),
        (1, "chart", "$1,500", "1500", None), (0, "chart", "1985 B.C.E.", "1985", None),
        (0, "chart", "1985%", "1985", None), (0, "chart", "1986 kg", "1985", None),
        (1, "math", "10:6", "5:3", "What is the ratio of a to b?"),
        (0, "math", "10:6", "5:3", "Simplify the ratio 10:6."),
        (0, "math", "6:10", "5:3", "What is the ratio of a to b?"),
        (0, "math", "4:60", "2:30", "When does it arrive?"),
        (0, "physics", "mgr", "mgR", "Give it by m, g and R."),
        (1, "physics", "Rmg", "mgR", "Give it by m, g and R."),
        (0, "math", "\\cos 30^\\circ", "\\frac{\\sqrt{3}}{2}", "What is the value of $\\cos 30^\\circ$?"),
        (1, "vqa", "Number 23", "23", "What number is on the shirt?"), (1, "vqa", "#23", "23", "What is the number?"),
        (1, "long_document", "12", "Page 12", "On which page is it?"),
        (0, "long_document", "page 13", "12", "Which page?"),
        (0, "long_document", "Table 7", "Figure 7", "Which figure or table shows it?"),
        (1, "choice", "0.75", "A", FRACTION), (1, "choice", "A. $\\frac{3}{4}$", "A", FRACTION),
        (0, "choice", "0.5", "A", FRACTION),
        (0, "choice", "A. $\\frac{2}{3}$", "A", FRACTION), (1, "choice", "c", "C", PRICE),
        (0, "choice", "d", "C", PRICE),
        (1, "choice", "C ($3.50)", "C", PRICE), (1, "choice", "3.50", "C", PRICE), (0, "choice", "2.50", "C", PRICE),
        (1, "physics", "Q", "B", LAMPS), (1, "physics", "(B) Q", "B", LAMPS), (0, "physics", "(B) R", "B", LAMPS),
        (1, "choice", "2^{n+1}", "B", POWERS), (0, "choice", "2^n+1", "B", POWERS), (1, "math", "2^(n+1)", "B", POWERS),
        (0, "choice", "B. $2^n + 1$", "B", POWERS), (1, "choice", "$2^{n} + 1$", "A", POWERS),
        (0, "math", "√2x", "B", ROOTS), (1, "math", "√(2x)", "B", ROOTS), (1, "math", "√2 x", "A", ROOTS),
        (1, "math", "x/2", "C", ROOTS), (1, "math", "C. x/2", "C", ROOTS),
        (1, "physics", "\\frac{mgR}{r}", "A", FORCES), (0, "physics", "mgr/R", "A", FORCES),
        (0, "physics", "mg", "C", FORCES), (1, "physics", "m - g", "C", FORCES),
        (1, "choice", "x-ray", "A", ANIMALS), (1, "choice", "dog (red)", "B", ANIMALS),
        (1, "choice", "b. dog (red)", "B", ANIMALS), (0, "choice", "a. dog (red)", "B", ANIMALS),
        (1, "vqa", "Rises by $x^2$", "C", ANIMALS), (0, "vqa", "rises by $x_2$", "C", ANIMALS),
        (1, "choice", "①②", "B", STATED), (0, "choice", "①③", "B", STATED), (1, "choice", "B", "①②", STATED),
        (0, "chemistry", "③①②", "①②③", "将下列溶液按pH从大到小排列"),
        (0, "physics", "R", "B", LAMPS), (1, "choice", "Therefore, the answer is B", "B", LAMPS),
    ],
)  # fmt: skip
def test_what_a_question_allows_and_refuses(expect, domain, answer, truth, question):
    verdict = verify(domain, kit.respond(answer), truth, question)
    assert (verdict.outcome, verdict.score) == (("score", 1) if expect else ("wrong", 0)), verdict.detail


@pytest.mark.parametrize(
    ("answer", "truth", "question"),
    [
        # beside Chinese text, after any verb, and in another order
        ("2^{10}", "1024", "计算2^{10}的值"), ("36 km/h", "10 m/s", "将36km/h换算为m/s"),
        ("x^2-1", "(x+1)(x-1)", "因式分解x^2-1"), ("\\sqrt{12}", "2\\sqrt{3}", "化简\\sqrt{12}"),
        ("(x+1)^2", "x^2+2x+1", "展开(x+1)^2"), ("36 km/h", "10 m/s", "36km/h等于多少m/s？"),
        ("3/4", "0.75", "Write 3/4 as a decimal."), ("7/8", "0.875", "What is 7/8 as a decimal?"),
        ("x = 3/4", "0.75", "Write 3/4 as a decimal."), ("6/8", "0.75", "What is 6/8?"),
        ("7/4", "1 3/4", "Change 7/4 to a mixed number."), ("36 km/h", "10 m/s", "What is 36 km/h in m/s?"),
        ("36 km/h", "10", "What is 36 km/h in m/s?"),
        ("72", "2^3 \\cdot 3^2", "Find the prime factorization of 72."),
        ("150000000", "1.5 \\times 10^8", "Express 150000000 in scientific notation."),
        ("3x+2x", "5x", "What is 3x + 2x?"), ("(x+1)(x+2)", "x^2+3x+2", "Multiply (x+1)(x+2)"),
        ("(x+1)^2", "x^2+2x+1", "What is $(x+1)^2$?"), ("2x+y=3", "y = 3 - 2x", "Take $2x+y=3$ for y."),
        ("(x+2)(x+1)", "x^2+3x+2", "Expand (x+1)(x+2)"), ("(x+2)(x+1)", "x^2+3x+2", "Multiply $(x+1)(x+2)$."),
        ("2+3x+x^2", "(x+1)(x+2)", "Factor x^2+3x+2"), ("9/12", "3/4", "Write 6/8 in lowest terms"),
        ("1 4/6", "1\\frac{2}{3}", "Simplify 20/12."),
    ],
)  # fmt: skip
def test_what_the_question_gives_is_no_answer(answer, truth, question):
    assert score("math", answer, truth, question) == 0


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
    assert score(domain, answer, truth, question) == 1


LINE, FOR_Y, CAR = "Find the equation of the line.", "Solve $2x + y = 3$ for $y$.", "Find the acceleration for a car."


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (0, "math", "3x - 5 = 7", "x = 4", "Solve 3x - 5 = 7"), (0, "math", "6x = 24", "x = 4", "Solve 3x - 5 = 7"),
        (0, "math", "3x - 5 = 7", "x = 4", None), (0, "math", "2x > 4", "x > 2", None),
        (1, "math", "2 < x", "x > 2", None),
        (0, "math", "-2x \\geq 6", "x \\leq -3", None), (0, "math", "x - 2 \\ne 0", "x \\ne 2", None),
        (0, "math", "x = x + x - 2", "x = 2", None), (1, "math", "4 = x", "x = 4", None),
        (0, "math", "2x=2, y=2", "x=1, y=2", None), (1, "math", "y=2, x=1", "x=1, y=2", None),
        (0, "math", "x+y=3, x-y=1", "x=2, y=1", None), (0, "math", "e^x = 2", "x = \\ln 2", None),
        (0, "math", "x-2=0, x+2=0", "x=2, x=-2", None), (0, "math", "2AB = 10", "AB = 5", None),
        (0, "physics", "2v = 10 m/s", "v = 5 m/s", None), (1, "physics", "v = 18 km/h", "v = 5 m/s", None),
        (1, "math", "2x - y + 3 = 0", "y = 2x + 3", LINE), (1, "math", "2x - y + 3 = 0", "y = 2x + 3", None),
        (1, "math", "x + 1 = 0", "x = -1", "Find the directrix of the parabola."),
        (1, "math", "y - 2 = 0", "y = 2", "求抛物线的准线"), (0, "math", "x + 1 = 0", "x = -1", "Solve it."),
        (0, "math", "4x + 2y = 6", "y = 3 - 2x", FOR_Y), (1, "math", "-2x + 3 = y", "y = 3 - 2x", FOR_Y),
        (0, "math", "y+1 = 2(x-3)", "y = 2x-7", "Write the equation of the line in slope-intercept form."),
        (1, "physics", "F = ma", "a = F/m", None), (1, "physics", "F = ma", "a = F/m", CAR),
        (0, "physics", "F = ma", "a = F/m", "Solve F = ma for a."),
        (0, "physics", "mv = Ft", "v = \\frac{Ft}{m}", "求v的表达式"),
        (1, "physics", "F/m = a", "a = F/m", "Express a in terms of F and m."),
    ],
)  # fmt: skip
def test_an_equation_is_solved_where_the_truth_gives_a_value_or_the_question_names_what_for(
    expect, domain, answer, truth, question
):
    """A line's may stand in any form, and so may a formula of which nothing is said."""
    assert score(domain, answer, truth, question) == expect
