"""Answers that nearly say what the truth says, and answers that say it in another way: work left to do, order,
negation, times of the day; and what a verifier is handed besides texts that people write."""

import pytest

from rlcs import rewards
from rlcs.rewards import check_truth, kit, verify
from rlcs.rewards.text import edit_distance

pytestmark = pytest.mark.long

RIGHT = (
    ("math", "\\boldsymbol{5}", "5"), ("math", "0.3\u0305", "1/3"), ("math", "\\sqrt{3} (≈1.732)", "\\sqrt{3}"),
    ("math", "\\sqrt{3} (approximately 1.732)", "\\sqrt{3}"), ("math", "π/3 radians", "\\pi/3"),
    ("physics", "\\frac{3\\sqrt2}{2} m", "2.12 m"), ("physics", "\\frac{\\sqrt3}{2}\\times10^{-3} m", "8.66e-4 m"),
    ("physics", "3\\sqrt{2}/2 m", "2.12 m"), ("physics", "\\frac{1}{2}\\sqrt{3} m", "0.866 m"),
    ("physics", "\\sqrt{20} m/s", "4.47 m/s"), ("physics", "e^{-1} V", "0.368 V"),
    ("physics", "10(1-e^{-2}) V", "8.65 V"), ("physics", "2\\ln 2 s", "1.39 s"),
    ("physics", "\\frac{\\pi}{2} s", "1.57 s"), ("physics", "4\\pi^2 N", "39.5 N"),
    ("physics", "100\\sqrt{3} N", "173 N"), ("physics", "100√3 N", "173.2 N"),
    ("physics", "100\\sqrt{3}\\,\\mathrm{N}", "173.2 N"), ("physics", "5 W/(m·K)", "5 W/m·K"),
    ("physics", "5 J/kg K", "5 J/(kg·K)"), ("chemistry", "0.5 mol L-1 s-1", "0.5 mol/(L·s)"),
    ("math", "\\frac{dy}{dx} = \\frac{y}{x}", "dy/dx = y/x"), ("math", "\\sin\\angle BAC = \\frac12", "\\frac12"),
    ("math", "\\tan\\angle ABC=2", "2"), ("math", "∠A=∠B", "\\angle A = \\angle B"),
    ("math", "∠1=∠2", "\\angle 1=\\angle 2"), ("math", "∠AOB=2∠ACB", "\\angle AOB = 2\\angle ACB"),
    ("math", "(1, 2, 3)", "\\begin{pmatrix}1\\\\2\\\\3\\end{pmatrix}"),
    ("math", "\\begin{pmatrix} 1 \\\\ 2 \\\\ 3 \\end{pmatrix}", "\\langle 1,2,3 \\rangle"),
    ("math", "\\begin{pmatrix}x\\\\y\\end{pmatrix}=\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
    ("math", "0 < a and a < 1", "0<a<1"), ("math", "x > 3 and x < 5", "(3,5)"),
    ("physics", "\\frac{10}{\\sqrt2} N", "7.07 N"), ("physics", "\\sqrt{50} N", "7.07 N"),
    ("math", "5\\sqrt2 cm", "7.0710678 cm"), ("math", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
    ("math", "3 \\text{ to } 4", "3:4"), ("math", "50 cents", "\\$0.50"), ("math", "$0.50", "50 cents"),
    ("math", "(-2, 3]", "x > -2 and x \\le 3"), ("math", "m<1且m≠0", "m<1 and m≠0"),
    ("physics", "5\\sqrt{2} N", "7.07 N"), ("physics", "5√2 m", "7.07 m"), ("physics", "\\sqrt{2} m/s", "1.414 m/s"),
    ("physics", "8.31 J/(mol K)", "8.314 J/mol·K"), ("physics", "4200 J/kg·°C", "4.2 kJ/(kg·K)"),
    ("chemistry", "iron(III) oxide", "Iron(III) oxide"), ("math", "dy/dx", "\\frac{dy}{dx}"),
    ("physics", "L\\frac{dI}{dt}", "L dI/dt"), ("math", "∠CBA", "\\angle ABC"), ("physics", "mgΔh", "mg\\Delta h"),
    ("math", "A'(1,2)", "(1,2)"), ("physics", "36 km/h = 10 m/s", "10 m/s"), ("math", "90 min = 1.5 h", "1.5 h"),
    ("physics", "5\\sqrt{2} \\text{ N}", "7.07 N"), ("physics", "F = 5\\sqrt2 N", "7.07 N"),
    ("physics", "\\frac{\\sqrt{2}}{2} s", "0.707 s"),
    ("physics", "5\\,\\frac{\\mathrm{kg}\\cdot\\mathrm{m}}{\\mathrm{s}^2}", "5 N"), ("math", "50¢", "$0.50"),
    ("vqa", "50 cents", "$0.50"), ("math", "2元5角", "25角"), ("math", "x > -2 and x < 3", "-2<x<3"),
    ("math", "x>1 and x≠2", "(1,2)\\cup(2,\\infty)"), ("math", "m ≤ 1 and m ≠ 0", "m≤1且m≠0"),
    ("math", "\\begin{pmatrix}1\\\\-2\\end{pmatrix}", "(1,-2)"), ("math", "A → B → C → D", "A-B-C-D"),
    ("biology", "5'-ATCG-3'", "5′-ATCG-3′"), ("chemistry", "iron (III) oxide", "Iron(III) oxide"),
    ("chemistry", "copper(II) sulfate", "Copper(II) Sulfate"), ("geography", "U.S.", "US"),
    ("long_document", "state-of-the-art", "state of the art"), ("physics", "10 N/2 = 5 N", "5 N"),
    ("math", "0.333…", "1/3"), ("math", "AB=BC=CD", "AB=BC=CD"), ("math", "\\frac{1+3i}{2}", "\\frac12+\\frac32 i"),
    ("math", "0.5+1.5i", "\\frac12+\\frac32 i"), ("math", "3i/2+1/2", "\\frac12+\\frac32 i"), ("math", "-2i", "-2i"),
    ("math", "\\sqrt{2}(1+i)", "\\sqrt2+\\sqrt2 i"), ("math", "2e^{i\\pi/3}", "1+\\sqrt3 i"),
    ("math", "(1+i)^2", "(1+i)^2"), ("math", "2i", "(1+i)^2"), ("math", "i", "i"), ("math", "j", "j"),
    ("math", "(1+\\sqrt2)(3-\\sqrt2)", "(1+\\sqrt{2})(3-\\sqrt{2})"), ("math", "2(1+\\sqrt3)", "2+2\\sqrt3"),
    ("math", "\\sqrt3(1+\\sqrt2)", "\\sqrt3+\\sqrt6"),
    ("math", "\\frac{\\sqrt6+\\sqrt2}{4}", "\\frac{\\sqrt2(\\sqrt3+1)}{4}"),
    ("math", "\\frac{1}{\\sqrt3+\\sqrt2}", "\\sqrt3-\\sqrt2"), ("math", "(x+1)(x+2)", "x^2+3x+2"),
    ("math", "\\frac{(1+\\sqrt5)}{2}", "\\frac{\\sqrt5+1}{2}"), ("math", "\\frac{6x}{2}", "\\frac{6x}{2}"),
    ("math", "\\frac{2x}{4}", "\\frac{x}{2}"), ("math", "2\\cdot 3^n", "2\\times3^n"),
    ("math", "3\\cdot 2^{n-1}", "3 \\times 2^{n-1}"), ("math", "\\frac{4}{3}\\pi r^3", "\\frac{4\\pi r^3}{3}"),
    ("math", "3 \\cdot 10^8", "3\\times10^8"), ("math", "1.2/10^5", "1.2\\times10^{-5}"),
    ("math", "\\frac{dy}{dx}=2x", "\\frac{dy}{dx}=2x"), ("math", "\\frac{dy}{dx} = -\\frac{x}{y}", "-x/y"),
    ("physics", "-\\frac{d\\Phi}{dt}", "-\\frac{d\\Phi}{dt}"),
    ("math", "y + \\frac{dy}{dx} = x", "\\frac{dy}{dx}+y=x"),
    ("math", "\\angle ABC = \\angle DEF", "\\angle DEF = \\angle ABC"), ("math", "∠ABC", "\\angle ABC"),
    ("math", "\\angle A + \\angle B", "\\angle B + \\angle A"), ("physics", "ω", "\\omega"),
    ("physics", "Ω", "\\Omega"), ("physics", "Δp", "\\Delta p"), ("physics", "\\Delta U = Q - W", "Q - W"),
    ("physics", "\\Phi = BA", "BA"), ("physics", "5 \\Omega", "5 Ω"), ("physics", "5Ω", "5 ohm"),
    ("physics", "\\Lambda", "Λ"), ("math", "\\Gamma(n)", "\\Gamma(n)"), ("vqa", "A'", "A′"), ("vqa", "'yes'", "yes"),
    ("vqa", "'A'", "A"), ("vqa", "the dog's", "dog's"), ("vqa", "dogs'", "dogs'"), ("math", "y' = 2x", "2x"),
    ("math", "f'(x)=2x", "2x"), ("math", "f'(x) = 2x", "f'(x)=2x"), ("math", "A'(1,2)", "A'(1,2)"),
    ("physics", "v' = 3 m/s", "3 m/s"), ("math", "B'", "B'"), ("math", "f''(x)", "f''(x)"), ("vqa", "Y", "yes"),
    ("physics", "2\\pi m", "6.28 m"), ("physics", "\\frac{20}{3} m/s", "6.67 m/s"), ("physics", "mg", "mg"),
    ("physics", "2mg", "2mg"), ("physics", "v = 5 \\frac{m}{s}", "5 m/s"),
    ("physics", "5 \\frac{\\text{m}}{\\text{s}}", "5 m/s"), ("physics", "5 \\text{ m}\\cdot\\text{s}^{-1}", "5 m/s"),
    ("math", "x>1 \\text{ and } x\\neq 2", "x>1, x≠2"), ("math", "a>1 and b<2", "a>1, b<2"),
    ("math", "a > 1 and b < 2", "b<2 and a>1"), ("math", "x = 1 and y = 2", "(1,2)"), ("math", "1 and 2", "1, 2"),
    ("math", "x < -1 \\text{ or } x > 3", "x>3 or x<-1"), ("math", "2y = 4 + 2x", "y = x+2"),
    ("math", "xy=1", "y=1/x"), ("math", "y=1/x", "xy=1"), ("math", "y = \\frac{k}{x}", "xy = k"),
    ("physics", "qvB = \\frac{mv^2}{r}", "r = \\frac{mv}{qB}"), ("math", "\\frac{x}{2}+\\frac{y}{3}=1", "3x+2y=6"),
    ("math", "x\\cos\\theta + y\\sin\\theta=1", "y\\sin\\theta+x\\cos\\theta=1"), ("math", "x^2+xy=0", "x^2+xy=0"),
    ("math", "x(x+y)=0", "x^2+xy=0"),
    ("math", "\\begin{bmatrix} \\frac12 \\\\ 2\\end{bmatrix}", "\\begin{bmatrix} 0.5 \\\\ 2\\end{bmatrix}"),
    ("math", "2i+3j", "2\\vec{i}+3\\vec{j}"), ("biology", "Met-Leu-Ser", "Met–Leu–Ser"),
    ("biology", "Hardy-Weinberg", "Hardy-Weinberg"), ("biology", "hardy weinberg", "Hardy-Weinberg"),
    ("physics", "-IR + V", "V-IR"), ("chemistry", "CH3-CH2-OH", "CH_3-CH_2-OH"), ("video", "C, A, B", "C, A, B"),
    ("chemistry", "2H2+O2=2H2O", "2H2 + O2 → 2H2O"), ("chemistry", "2O3 = 3O2", "2O3 → 3O2"),
    ("chemistry", "2NO2 = N2O4", "2NO2 -> N2O4"), ("chemistry", "2SO3 = 2SO2 + O2", "2SO3 → 2SO2 + O2"),
    ("vqa", "rock n roll", "rock n' roll"), ("vqa", "Coca Cola", "Coca-Cola"), ("biology", "Coca Cola", "Coca-Cola"),
    ("biology", "Rh-negative", "Rh negative"), ("chemistry", "Friedel-Crafts", "Friedel–Crafts"),
    ("physics", "V-IR", "V - IR"), ("physics", "E-Ir", "E - Ir"), ("math", "S-A-B", "S-A-B"),
    ("math", "5 \\cdot m", "5m"), ("math", "m \\cdot 5", "5m"), ("math", "5g", "5 g"),
    ("physics", "\\sqrt{20} = 4.47 m/s", "4.47 m/s"), ("physics", "0.5\\pi s", "1.57 s"),
    ("physics", "\\approx 173 N", "≈173 N"), ("physics", "50\\sqrt{3}\\text{ N} \\approx 86.6 \\text{ N}", "86.6 N"),
    ("physics", "5 kg m/s", "5 kg·m/s"), ("physics", "5 kg·m²/s²", "5 J"), ("physics", "5 N·m²/C²", "5 N m^2 C^{-2}"),
    ("physics", "5 W/m/K", "5 W/(m·K)"), ("physics", "5 m³/(kg·s²)", "5 m^3 kg^{-1} s^{-2}"),
    ("physics", "5 \\mathrm{J/(kg\\cdot K)}", "5 J/kg/K"), ("chemistry", "5 L·mol⁻¹·s⁻¹", "5 L/(mol·s)"),
    ("chemistry", "5 M^{-1}s^{-1}", "5 L/(mol·s)"), ("chemistry", "0.5 mol·L⁻¹·min⁻¹", "0.5 mol/(L·min)"),
    ("physics", "$v = 5\\ \\mathrm{m/s}$", "5 m/s"), ("physics", "v=5m/s", "5 m/s"),
    ("physics", "a = -2\\,\\text{m/s}^2", "-2 m/s²"), ("physics", "2 m/s² (downward)", "2 m/s² downward"),
    ("physics", "T = 2\\pi\\sqrt{m/k}", "2\\pi\\sqrt{\\frac{m}{k}}"),
    ("physics", "\\sqrt{\\frac{3kT}{m}}", "\\sqrt{3kT/m}"), ("physics", "\\frac{V^2}{R}", "V^2/R"),
    ("physics", "\\frac{1}{2}kx^2", "kx^2/2"),
    ("physics", "n_1\\sin\\theta_1 = n_2\\sin\\theta_2", "n_2 \\sin\\theta_2 = n_1\\sin\\theta_1"),
    ("physics", "PV=nRT", "nRT = PV"), ("math", "\\frac{d^2y}{dx^2}", "\\frac{d^2y}{dx^2}"),
    ("math", "\\frac{\\partial z}{\\partial x} = 2x", "2x"), ("math", "y' + y = 0", "y'+y=0"),
    ("math", "f'(x) = 3x^2", "3x^2"), ("math", "f^{\\prime}(x) = 3x^2", "f'(x) = 3x^2"),
    ("math", "\\Delta = b^2-4ac", "b^2-4ac"), ("math", "\\Delta = 5", "5"), ("math", "Δ>0", "\\Delta > 0"),
    ("math", "Δ = 0", "\\Delta=0"), ("math", "\\sigma = 2", "2"), ("math", "\\Phi(1.96)", "\\Phi(1.96)"),
    ("math", "△ABC", "\\triangle ABC"), ("math", "∠BAC", "\\angle BAC"), ("math", "\\angle BAC = 60^\\circ", "60°"),
    ("math", "m\\angle BAC = 60^\\circ", "60"), ("math", "\\sin\\angle BAC", "\\sin\\angle CAB"),
    ("math", "AB=2CD", "AB = 2CD"), ("math", "AB = AC", "AC=AB"), ("math", "AB:AC = 1:2", "1:2"),
    ("math", "z = 1+i", "1+i"), ("math", "1+1i", "1+i"), ("math", "i+1", "1+i"),
    ("math", "-\\frac{1}{2}+\\frac{\\sqrt3}{2}i", "\\frac{-1+\\sqrt{3}i}{2}"),
    ("math", "e^{2\\pi i/3}", "-\\frac12+\\frac{\\sqrt3}{2}i"), ("math", "|z|=5", "5"),
    ("math", "\\sqrt{5}i", "i\\sqrt5"), ("math", "2\\sqrt{-1}", "2i"), ("math", "\\frac{3}{2}i", "1.5i"),
    ("math", "(3-2i)", "3-2i"), ("math", "3 - 2 \\mathrm{i}", "3-2i"), ("math", "3-2j", "3-2j"),
    ("math", "\\vec{v} = (1,2)", "(1,2)"), ("math", "a>1 or a<-1", "a<-1 or a>1"),
    ("math", "0<a<1 or a>2", "(0,1)\\cup(2,\\infty)"), ("math", "x≥0, y≥0", "x≥0 and y≥0"),
    ("math", "x ≥ 0 and y ≥ 0", "y≥0, x≥0"), ("math", "3 and 5", "5 and 3"), ("math", "x = 3 and x = 5", "3, 5"),
    ("math", "x=3 and y=5", "x=3, y=5"), ("math", "x = 3 \\text{ and } y = 5", "(3, 5)"), ("video", "12.5 s", "12.5"),
    ("video", "12.5", "12.5 seconds"), ("video", "[0:12, 0:15]", "0:12, 0:15"),
    ("video", "0:12 to 0:15", "0:12-0:15"), ("video", "00:00:12", "0:12"), ("video", "3 times", "3"),
    ("video", "three times", "3"), ("video", "1→2→3", "1, 2, 3"), ("vqa", "print('hi')", "print('hi')"),
    ("vqa", "x = 5", "x=5"), ("math", "[1, 2, 3]", "[1,2,3]"), ("math", "True", "true"), ("math", "\"abc\"", "abc"),
    ("math", "0x1F", "0x1f"), ("math", "0b1010", "0b1010"), ("math", "\\text{five}", "5"),
)  # fmt: skip
WRONG = (
    ("math", "5...", "5"), ("math", "(1+\\sqrt2)(\\sqrt2-1)", "1"), ("math", "(1+i)(1-i)", "2"),
    ("math", "\\frac{5}{1+2i}", "1-2i"), ("math", "(1+i)^2", "2i"), ("math", "i^{2023}", "-i"),
    ("math", "\\frac{1}{i}", "-i"), ("math", "e^{0}", "1"), ("math", "0.5/0.1", "5"),
    ("math", "\\frac{\\partial z}{\\partial y} = 2x", "\\frac{\\partial z}{\\partial x} = 2x"),
    ("math", "i \\cdot i", "-1"), ("math", "\\frac{3}{2i}", "-1.5i"), ("math", "x ≥ 0 or y ≥ 0", "x≥0 and y≥0"),
    ("vqa", "x == 5", "x != 5"), ("vqa", "a && b", "a || b"), ("vqa", "!a", "a"), ("math", "'abc'", "'bca'"),
    ("math", "0x1F", "0x1E"), ("math", "0b1011", "0b1010"), ("math", "wrong = 5", "5"), ("math", "not = 5", "5"),
    ("math", "x is not = 5", "5"), ("choice", "!B", "B"), ("choice", "B'", "B"),
    ("math", "x < 2 and x > 5", "(-\\infty,2)\\cup(5,\\infty)"), ("math", "\\{\\emptyset\\}", "\\emptyset"),
    ("physics", "10 N/2", "5 N"), ("physics", "2 N + 3 N", "5 N"), ("physics", "\\frac{25 N}{5}", "5 N"),
    ("biology", "5'-GCTA-3'", "5'-ATCG-3'"), ("video", "A, B, C", "B,A,C"), ("math", "A-C-B-D", "A-B-C-D"),
    ("biology", "A-C-B-D", "A-B-C-D"), ("biology", "Met-Ser-Leu", "Met-Leu-Ser"), ("biology", "G-A-T", "G-T-A"),
    ("chemistry", "CH3-CO-CH2-OH", "CH3-CH2-CO-OH"), ("chemistry", "C=O", "O=C=O"),
    ("math", "\\angle ABC", "\\angle ACB"), ("math", "A'", "A"), ("math", "f''(x)", "f'(x)"), ("math", "y''", "y'"),
    ("math", "\\Delta", "\\delta"), ("math", "\\Omega", "\\omega"), ("physics", "\\Omega", "\\omega"),
    ("math", "dx/dy", "dy/dx"), ("math", "\\frac{\\partial f}{\\partial x}", "\\frac{\\partial f}{\\partial y}"),
    ("math", "x(x-2y+3)=0", "x-2y+3=0"), ("math", "xy=0", "x=0"), ("math", "5…", "5"),
    ("math", "1, 2, 3, ...", "1, 2, 3"), ("math", "(2+3i)(1-i)", "5+i"),
    ("math", "\\frac{2+i}{1-i}", "\\frac12+\\frac32 i"), ("math", "1.2/0.1", "12"),
    ("math", "\\angle ACB = \\angle DEF", "\\angle DEF = \\angle ABC"), ("physics", "δp", "\\Delta p"),
    ("vqa", "A'", "A"), ("math", "B''", "B'"), ("physics", "\\frac{20 m}{4 s}", "5 m/s"),
    ("physics", "10 N - 5 N", "5 N"), ("math", "4mg/2", "2mg"), ("math", "x<2 and x>5", "x<2 or x>5"),
    ("math", "x < -1 \\text{ and } x > 3", "x>3 \\text{ or } x<-1"), ("math", "x^2(x-y)=0", "x=y"),
    ("video", "A, B, C", "C, A, B"), ("counting", "5ish", "5"), ("counting", "五六", "56"),
    ("counting", "三四", "34"), ("counting", "十来个", "10"), ("counting", "一些", "1"), ("chart", "50ish", "50"),
    ("physics", "5 N * 2", "10 N"), ("physics", "10 m/s/2", "5 m/s"), ("math", "0.3\u0305", "0.3"),
    ("math", "AB=BC", "AB=BC=CD"), ("math", "AB=BC=CE", "AB=BC=CD"), ("math", "\\int_0^1 x dx", "1/2"),
    ("math", "\\int_0^1 x\\,dx = \\frac12", "1/3"), ("math", "-i", "i"), ("math", "\\frac{dx}{dy}", "\\frac{dy}{dx}"),
    ("physics", "-\\frac{d\\phi}{dx}", "-\\frac{d\\phi}{dt}"),
    ("math", "y - \\frac{dy}{dx} = x", "\\frac{dy}{dx}+y=x"), ("math", "\\Gamma", "\\gamma"),
    ("physics", "36 km/h = 11 m/s", "10 m/s"), ("physics", "5\\sqrt{2} \\text{ kN}", "7.07 N"),
    ("physics", "5\\sqrt{3} N", "7.07 N"), ("physics", "5√2", "7.07 N"),
    ("physics", "\\sqrt{2}\\cdot 5 \\cdot 2 N", "14.14 N"), ("physics", "\\frac{20 m}{3 s}", "5 m/s"),
    ("physics", "20 m / 4 s", "5 m/s"), ("physics", "2 · 2.5 N", "5 N"), ("math", "10 cm / 2", "5 cm"),
    ("math", "2 cm + 3 cm", "5 cm"), ("math", "2 + 3 cm", "5 cm"), ("math", "5¢", "$0.50"),
    ("vqa", "50 cents", "$50"), ("math", "$1", "1 cent"), ("math", "a > 1 且 b < 2", "(1,2)"),
    ("math", "x(y-2)=0", "y=2"), ("math", "xy=2x", "y=2"), ("biology", "Leu-Met", "Met-Leu"),
    ("math", "D-C-B-A", "A-B-C-D"), ("biology", "3'-ATCG-5'", "5'-ATCG-3'"),
    ("chemistry", "copper(I) sulfate", "Copper(II) Sulfate"), ("vqa", "下午3点", "3:00"), ("vqa", "3:05", "15:05"),
    ("chemistry", "Crafts-Friedel", "Friedel-Crafts"), ("physics", "6\\sqrt{2}/2 m", "4.24 m"),
    ("physics", "50\\sqrt{3}\\text{ N} \\approx 87.9 \\text{ N}", "86.6 N"), ("physics", "5 W/(m·K)", "5 W·K/m"),
    ("physics", "5 W K/m", "5 W/(m K)"), ("physics", "a = 2\\,\\text{m/s}^2", "-2 m/s²"),
    ("physics", "\\sqrt{\\frac{3kT}{M}}", "\\sqrt{3kT/m}"), ("physics", "I^2R", "V^2/R"),
    ("physics", "PV = nR", "PV=nRT"), ("math", "\\Delta > 0", "\\Delta < 0"), ("math", "△ABD", "\\triangle ABC"),
    ("math", "\\angle BAC = 61^\\circ", "60°"), ("math", "∠1=∠3", "\\angle 1=\\angle 2"),
    ("math", "∠AOB=∠ACB", "\\angle AOB = 2\\angle ACB"), ("math", "CD=2AB", "AB = 2CD"), ("math", "1-i", "1+i"),
    ("math", "e^{i\\pi}", "-1"), ("math", "e^{i\\pi}+1", "0"), ("math", "|3+4i|", "5"),
    ("math", "2i \\cdot 3i", "-6"), ("video", "12.6", "12.5"), ("video", "0:15-0:12", "0:12-0:15"),
    ("video", "0:12", "0:12, 0:15"), ("video", "thrice or more", "3"), ("video", "1→3→2", "1, 2, 3"),
    ("video", "he then she", "she then he"), ("vqa", "print('ho')", "print('hi')"), ("vqa", "x = 6", "x=5"),
    ("vqa", "i++", "i--"), ("vqa", "<div>", "<span>"), ("vqa", "a[0]", "a[1]"), ("vqa", "{a}", "[b]"),
    ("vqa", "O(n)", "O(1)"), ("math", "O(n)", "O(1)"), ("math", "O(\\log n)", "O(n)"),
    ("math", "[3, 2, 1]", "[1,2,3]"), ("math", "[True, False]", "[False, True]"), ("math", "1010", "1100"),
    ("vqa", "0b1011", "0b1010"), ("vqa", "0.1.0", "0.10"), ("math", "answer \\neq 5", "5"),
    ("math", "answer != 5", "5"), ("math", "5 = wrong", "5"), ("math", "never(5)", "5"),
    ("math", "x = \\text{not } 5", "5"), ("math", "\\text{not } 5", "5"), ("math", "~5", "5"), ("math", "!5", "5"),
    ("math", "\\overline{5}", "5"), ("math", "5^\\complement", "5"), ("math", "x \\ne 5, x = 6", "5"),
    ("math", "x = 6 \\Rightarrow 5", "5"), ("math", "6 \\to 5", "5"), ("math", "5 \\to 6", "5"),
    ("math", "f: 5 \\mapsto 6", "5"), ("math", "x \\to 5", "5"), ("math", "5^-", "5"), ("math", "5^+", "5"),
    ("math", "5_+", "5"), ("math", "5_6", "5"), ("math", "5_{10}", "6"), ("math", "5\\%", "5"),
    ("math", "5\\text{ mod }7", "5"), ("math", "5^{\\text{not}}", "5"), ("math", "5\\times", "5"),
    ("math", "\\times5", "5"), ("math", "+-5", "5"), ("math", "-+5", "5"), ("math", "5e", "5"), ("math", "5e0", "6"),
    ("math", "5.5.5", "5.5"), ("math", "5,5", "5.5"), ("math", "5:5", "5"), ("math", "(5", "5"), ("math", "5)", "5"),
    ("math", "[5)", "5"), ("math", "{5,}", "5"), ("math", "5 =", "6"), ("math", "= 5 = 6", "5"),
    ("math", "5 < 6", "5"), ("math", "4 < 5", "5"), ("math", "4<x<6", "5"), ("math", "x<=5<=x", "5"),
    ("math", "5 ∈ Z", "5"), ("math", "x∈{5}", "6"), ("math", "\\sqrt{5}", "5"), ("math", "5i", "5"),
    ("math", "5°F", "5°C"), ("math", "5\\text{ wrong}", "5"), ("math", "5^{th}", "6"),
    ("math", "5 \\text{ is not the answer}", "5"), ("math", "5*0", "5"), ("math", "5*0", "0"), ("math", "5-5", "0"),
    ("math", "\\ln 1", "0"), ("math", "\\sin 0", "0"), ("math", "x^0", "1"), ("math", "1^x", "1"),
    ("math", "\\frac{x}{x}", "1"), ("math", "\\frac{0}{5}", "0"), ("math", "\\sin^2 x + \\cos^2 x", "1"),
    ("math", "2^{\\log_2 5}", "5"), ("math", "\\lceil 4.5\\rceil", "5"), ("math", "\\operatorname{round}(4.6)", "5"),
    ("math", "int(5.2)", "5"), ("math", "len([1,2,3,4,5])", "5"), ("math", "sum([2,3])", "5"),
    ("math", "eval('5')", "5"), ("math", "\\left\\lfloor5.5\\right\\rfloor", "5"),
    ("math", "10\\%\\text{ of }50", "5"), ("math", "10% of 50", "5"), ("math", "half of 10", "5"),
    ("math", "10 \\cdot 50\\%", "5"), ("math", "500\\%", "6"), ("math", "twice 2.5", "5"),
    ("math", "5 more than 0", "5"), ("math", "the square root of 25", "5"), ("math", "one more than four", "5"),
    ("math", "the number of fingers", "5"), ("math", "\\text{five or six}", "5"), ("physics", "wrong = 5 N", "5 N"),
    ("physics", "not 5 N", "5 N"), ("physics", "F \\neq 5 N", "5 N"), ("physics", "F < 5 N", "5 N"),
    ("physics", "F \\le 5 N", "5 N"), ("physics", "F = 5 N or 6 N", "5 N"), ("physics", "F = 5 N, G = 6 N", "5 N"),
    ("physics", "F=5 N (wrong)", "5 N"), ("physics", "5\\sqrt{2} N or 6 N", "7.07 N"),
    ("physics", "7.07\\cdot 1 N", "6 N"), ("physics", "\\frac{1}{\\sqrt2}\\cdot 10 N", "6 N"),
    ("physics", "5 \\times \\sqrt{2} wrong N", "7.07 N"), ("physics", "\\neq 5\\sqrt2 N", "7.07 N"),
    ("physics", "<5\\sqrt2 N", "7.07 N"), ("physics", "±5√2 N", "7.07 N"), ("physics", "5√2 N ± 1 N", "7.07 N"),
    ("physics", "(5√2, 6) N", "7.07 N"), ("physics", "5√2, 6 N", "7.07 N"), ("physics", "5√2 x N", "7.07 N"),
    ("physics", "|-5√2| N", "7.07 N"), ("physics", "-5√2 N", "7.07 N"), ("physics", "{5√2} N", "7 m"),
    ("physics", "[5√2, 8] N", "7.07 N"), ("physics", "x=5√2, x=8 N", "7.07 N"), ("physics", "5√2 N/m", "7.07 N"),
    ("physics", "5√2 Nm", "7.07 N"), ("physics", "5√2 N", "7.07 kN"), ("math", "5\\sqrt2 cm", "7.07 cm"),
    ("math", "5\\sqrt2 m", "7.0710678 cm"), ("vqa", "no dog", "dog"), ("vqa", "anything but dog", "dog"),
    ("vqa", "= dog = cat", "dog"), ("vqa", "dog = false", "dog"), ("vqa", "dog != cat", "dog"),
    ("vqa", "dog -> cat", "dog"), ("vqa", "cat -> dog", "dog"), ("counting", "dogs: 5, cats: 3", "5"),
    ("counting", "5 (five) or 6", "5"), ("counting", "5 = 6", "5"), ("counting", "x ≠ 5", "5"),
    ("chart", "≠ 50", "50"), ("chart", "wrong = 50", "50"), ("chart", "not = 50", "50"),
    ("chart", "50 = wrong", "50"), ("vqa", "wrong = dog", "dog"), ("vqa", "not = 50", "50"),
    ("counting", "wrong = 5", "5"), ("counting", "never = 5", "5"), ("counting", "at most = 5", "5"),
    ("choice", "not = B", "B"), ("choice", "wrong: B", "B"), ("choice", "≠B", "B"), ("choice", "~B", "B"),
    ("choice", "B^c", "B"), ("choice", "\\overline{B}", "B"), ("choice", "\\neg B", "B"),
    ("choice", "all except B", "B"), ("choice", "anything but B", "B"), ("choice", "A = B", "B"),
    ("choice", "A → B", "B"), ("choice", "A > B", "B"), ("math", "1, 2, 3, 4, 5, 6", "5"),
    ("math", "\\{1,2,3,4,5\\}", "5"), ("math", "(-\\infty,\\infty)", "5"), ("math", "x \\in \\mathbb{R}", "5"),
    ("math", "n", "5"), ("math", "k", "5"), ("math", "a", "b"), ("math", "answer", "5"), ("math", "the answer", "5"),
    ("math", "5 + C", "5"), ("math", "5k", "5"), ("math", "5 + n", "5"), ("math", "5n, n=1", "5"),
    ("math", "5 \\cdot 1^{n}", "5"), ("math", "5 (n = 1)", "5"), ("math", "5 \\text{ if } x>0", "5"),
    ("math", "5 when x=1", "5"), ("math", "5 for x>0", "5"), ("math", "5, if x>0", "5"),
    ("math", "5; otherwise 6", "5"), ("math", "\\begin{cases}5\\\\6\\end{cases}", "5"), ("math", "max{5,6}", "5"),
    ("math", "min(5,6)", "5"), ("math", "5 vs 6", "5"), ("math", "5 (or maybe 6)", "5"),
    ("math", "5, alternatively 6", "5"), ("math", "5 else 6", "5"), ("math", "5 \\lor 6", "5"),
    ("math", "5 \\vee 6", "5"), ("math", "5 \\cup 6", "5"), ("math", "{5} ∪ {6}", "5"), ("math", "5|6", "5"),
    ("math", "5∨6", "5"), ("math", "5或6", "5"), ("math", "5、6", "5"), ("math", "5，6", "5"),
    ("math", "5 oder 6", "5"), ("math", "5 ou 6", "5"), ("math", "5 o 6", "5"), ("math", "5 или 6", "5"),
    ("vqa", "dog ou cat", "dog"), ("vqa", "dog; cat", "dog"), ("vqa", "dog | cat", "dog"),
    ("vqa", "dog (or cat)", "dog"), ("vqa", "dog, possibly cat", "dog"), ("vqa", "a dog but maybe a cat", "dog"),
    ("vqa", "probably dog", "dog"), ("vqa", "dog or something else", "dog"), ("vqa", "I think it is a dog", "dog"),
    ("vqa", "cat not dog", "dog"), ("vqa", "hot dog", "dog"), ("vqa", "dog house", "dog"), ("vqa", "dog", "hot dog"),
    ("vqa", "do g s", "dog"), ("counting", "5 or so", "5"), ("counting", "5~6", "5"), ("counting", "5 to 6", "5"),
    ("counting", "5 and a half", "5"), ("counting", "5 plus 1", "5"), ("counting", "5 dozen", "5"),
    ("counting", "5/5", "5"), ("counting", "five fifths", "5"), ("counting", "5 out of 6", "5"),
    ("counting", "5 minus 1", "5"), ("counting", "not five", "5"), ("counting", "fewer than five", "5"),
    ("counting", "5?", "5"), ("counting", "5, maybe", "5"), ("counting", "=5=6", "5"), ("counting", "0-5", "5"),
    ("counting", "5 6 7", "567"), ("counting", "5,6", "56"), ("counting", "1,2", "12"), ("counting", "12,3", "123"),
    ("counting", "²", "2"), ("counting", "2²", "2"), ("counting", "2²", "22"), ("counting", "1½", "11"),
    ("counting", "½", "1"), ("counting", "5!", "5"), ("counting", "-0", "5"), ("counting", "0x5", "5"),
    ("counting", "five hundred", "5"), ("counting", "half a dozen", "12"), ("counting", "两三个", "2"),
    ("counting", "五六个", "5"), ("counting", "几个", "3"), ("counting", "第五", "5"), ("counting", "百分之五", "5"),
    ("counting", "五分之一", "5"), ("chart", "50 to 60", "55"), ("chart", "50±5", "50"), ("chart", "50 +/- 5", "50"),
    ("chart", "50 (approx)", "50"), ("chart", "50 / 60", "50"), ("chart", "50, 60", "50"),
    ("chart", "50 and 60", "50"), ("chart", "over 50", "50"), ("chart", "50 or higher", "50"),
    ("chart", "just under 50", "50"), ("chart", "50?", "50"), ("chart", "nearly 50", "50"), ("chart", "51.3", "50"),
    ("chart", "48.7", "50"), ("chart", "1999 or 2000", "2000"), ("chart", "2000s", "2000"),
    ("chart", "c. 2000", "2000"), ("chart", "circa 2000", "2000"), ("chart", "the 2000", "1999"),
    ("chart", "FY 2000", "1999"), ("chart", "2000.4", "2000"), ("chart", "-2000", "2000"), ("chart", "2000%", "2000"),
    ("chart", "Apple", "Apple, Banana"), ("chart", "Apple, Banana, Cherry", "Apple, Banana"),
    ("chart", "all", "Apple, Banana"), ("chart", "Banana, Apple", "Apple, Banana"), ("chart", "12%, 18%", "12, 15"),
    ("chart", "12, 15 or 16", "12, 15"), ("math", "2.718", "e"), ("math", "E", "e"), ("math", "no", "True"),
    ("math", "Tuesday", "Monday"), ("math", "right triangle", "Isosceles triangle"),
    ("math", "rhombus", "parallelogram"), ("math", "odd", "even"), ("math", "neither even nor odd", "even"),
    ("math", "even and odd", "even"), ("math", "SAS", "ASA"), ("math", "SSA", "SAS"),
    ("math", "Quadrant III", "quadrant II"), ("math", "III", "II"), ("math", "第三象限", "第二象限"),
    ("math", "不存在", "0"), ("math", "等边三角形", "等腰三角形"), ("math", "divergent", "convergent"),
    ("math", "1,000.5", "1000"), ("math", "\\frac{-1}{-2}", "-\\frac12"), ("math", "2^{-1/2}", "\\sqrt2"),
    ("math", "7!/7", "720"), ("math", "99!", "100!"), ("math", "2^{2022}", "2^{2023}"),
    ("math", "2^{2023}-1", "2^{2023}"), ("math", "\\frac{2^{10}-1}{2^{10}}", "1"),
)  # fmt: skip


@pytest.mark.parametrize(("expect", "domain", "answer", "truth"), [(0, *x) for x in WRONG] + [(1, *x) for x in RIGHT])
def test_close_calls(expect, domain, answer, truth):
    verdict = verify(domain, kit.respond(answer), truth)
    assert (verdict.outcome, verdict.score) == (("score", 1) if expect else ("wrong", 0)), verdict.detail


COLOURS = "Which colour?\nA. red\nB. blue"


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth", "question"),
    [
        (1, "choice", "blue (B)", "B", COLOURS), (1, "choice", "B, blue", "B", COLOURS),
        (0, "choice", "red (B)", "B", COLOURS), (0, "choice", "blue (A)", "B", COLOURS),
        (0, "choice", "B, red", "B", COLOURS), (0, "choice", "A, B", "B", COLOURS),
        (1, "choice", "\\boxed{\\text{B}}", "B", COLOURS), (1, "choice", "\\boxed{\\textbf{(B)}}", "B", COLOURS),
        (1, "choice", "A, B", "B, A", COLOURS), (0, "math", "sqrt(50)", "5\\sqrt{2}", "Simplify \\sqrt{50}"),
        (1, "physics", "F_N - F_T - F_G", "F_N-F_G-F_T", "A block feels F_N, F_T and F_G."),
        (1, "physics", "2 m g", "2 mg", "A block of mass m falls under gravity g."),
        (1, "physics", "20", "20 m/s", "Convert 72 km/h to m/s."), (0, "physics", "20", "20 m/s", "How fast is it?"),
        (0, "physics", "72 km/h", "20 m/s", "Convert 72 km/h to m/s."),
        (1, "math", "k<1,k≠0", "k<1且k≠0", "Find k."), (0, "math", "k<1或k≠0", "k<1 and k≠0", "Find k."),
        (1, "math", "2(2)+3 = 7", "7", "If x=2, find 2x+3."), (0, "math", "2(2)+3", "7", "If x=2, find 2x+3."),
    ],
)  # fmt: skip
def test_close_calls_of_a_question(expect, domain, answer, truth, question):
    assert verify(domain, kit.respond(answer), truth, question).score == expect


@pytest.mark.parametrize(
    "domain", ["math", "physics", "geography", "chart", "vqa", "spatial", "video", "long_document"]
)
def test_times_of_the_day(domain):
    """Of 12 hours and of 24; 5:30 alone may be either, or of a film, and stands as it is written."""
    equal = (
        ("17:00", "5:00 pm", "5 p.m.", "5:00PM", "5 PM.", "5:00:00 pm", "下午5:00", "下午5点", "5:00\\text{ p.m.}"),
        ("00:30", "12:30 am", "0:30 "), ("05:00", "5 am", "5:00 A.M.", "上午5点"), ("noon", "12 pm", "12:00 PM"),
        ("midnight", "12 am", "12 midnight"), ("9:00-17:00", "9 a.m. to 5 p.m.", "9:00 AM – 5:00 PM"),
    )  # fmt: skip
    for same in equal:
        for answer in same:
            for truth in same:
                if any(mark in (answer + truth).casefold() for mark in ("m", "午", "noon")):
                    assert verify(domain, kit.respond(answer), truth).score == 1, (answer, truth)
    for truth, *others in (
        ("17:00", "5:00 am", "5:00", "5 pm or 6 pm", "about 5 pm", "17:00 pm", "5:01 pm", "7:00 pm", "5"),
        ("5:00 pm", "5:00", "5 am", "17:30", "15:00"), ("5:00", "5:00 pm", "17:00"),
        ("noon", "midnight", "12 am", "afternoon"),
        ("9:00-17:00", "9 am to 5 am", "9 am", "5 pm", "9 pm to 5 pm"),
    ):  # fmt: skip
        for answer in others:
            assert verify(domain, kit.respond(answer), truth).score == 0, (answer, truth)


def test_a_film_has_no_times_of_the_day():
    assert verify("video", kit.respond("17:00"), "17:00:00").score == 0
    assert verify("video", kit.respond("1:23"), "00:01:23").score == 1


def test_a_built_in_verifier_is_replaced_on_purpose_alone(monkeypatch):
    monkeypatch.setattr(rewards, "DOMAINS", dict(rewards.DOMAINS))
    text = "register: domain must be a new one, or replace=True be given, got the built-in 'math'"
    with pytest.raises(ValueError, match=text):
        rewards.register("math", lambda *_: 1.0)
    assert verify("math", kit.respond("6"), "5").score == 0
    rewards.register("math", lambda *_: 1.0, replace=True)
    assert verify("math", kit.respond("6"), "5").score == 1
    for score in (0.25, 0.5):  # one's own, again in a notebook
        rewards.register("mine", lambda *_, score=score: score)
        assert verify("mine", kit.respond("6"), "5").score == score


def test_an_error_says_what_happened_and_names_no_class_of_ours(tmp_path, monkeypatch):
    (tmp_path / "slow_one.py").write_text(
        "import time\ndef sleeps(*_): time.sleep(60)\ndef fails(*_): raise KeyError('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards.worker._forget()
    monkeypatch.setitem(rewards.DOMAINS, "slow", rewards.Remote("slow_one:sleeps", deadline_s=0.3))
    for domain, detail in (("slow", "no result within 0.3 s"), ("slow_one:fails", "KeyError: 'x'")):
        verdict = verify(domain, kit.respond("1"), "1")
        assert (verdict.outcome, verdict.detail) == ("error", detail)


@pytest.mark.parametrize("odd", [5, 5.0, [5], {"a": 5}, None, b"5", True])
def test_what_is_no_text_is_named(odd):
    for arguments in (("math", odd, "5"), ("math", kit.respond("5"), odd)):
        with pytest.raises(ValueError, match=f"must be a text, got {type(odd).__name__}"):
            verify(*arguments)
    with pytest.raises(ValueError, match="domain must be one of math"):
        verify(odd, kit.respond("5"), "5")
    with pytest.raises(ValueError, match=f"math: truth must be a text, got {type(odd).__name__}"):
        check_truth("math", odd)


@pytest.mark.parametrize("domain", ["math", "vqa", "chart", "counting", "grounding", "gui_os"])
def test_a_truth_must_hold_something(domain):
    for truth in ("", " \n", "<think>a</think><answer></answer>"):
        with pytest.raises(ValueError, match="truth must"):
            check_truth(domain, truth)


def test_a_path_names_a_module_and_a_function():
    for path in (":name", "module:", ":"):
        with pytest.raises(ValueError, match="module:name"):
            rewards.Remote(path)


HEAVY = (
    "10^10^10", "9!!!!", "((9!)!)!", "(x+y+z)^{300}", "e^" * 300 + "2", "i^" * 300 + "2", "(1+i)^{9999}",
    "(1+i)" * 300, "(" * 900 + "5" + ")" * 900, "{" * 10**6, "1," * 500_000, "12:" * 600 + "00", "am " * 700,
    "x<1 and " * 300 + "x>2", "\\begin{pmatrix}" * 100, "A-" * 10**5 + "B", "5 N/" * 400 + "2", "'" * 10**5,
)  # fmt: skip


@pytest.mark.parametrize("answer", HEAVY, ids=lambda answer: answer[:12])
def test_what_takes_long_to_work_out_is_wrong_and_the_same_each_time(answer):
    for domain, truth in (
        ("math", "5"), ("physics", "5 N"), ("chemistry", "H2O"), ("chart", "12"), ("vqa", "5:00 pm"), ("choice", "B"),
        ("counting", "5"), ("grounding", "[1,2,30,40]"), ("gui_os", "WAIT()"), ("math", "x<1 and x>0"),
        ("math", "A-B-C"),
    ):  # fmt: skip
        first = verify(domain, kit.respond(answer), truth)
        assert (first.outcome, first.score) in (("wrong", 0), ("format", 0)), (domain, first)
        assert verify(domain, kit.respond(answer), truth) == first


def test_a_long_text_beside_a_short_one_takes_no_hours():
    """Rows of as many bits as the longer one has would take gigabytes of traffic."""
    assert edit_distance("a" * 10**6, "abc") == edit_distance("abc", "a" * 10**6) == 10**6 - 1
    assert verify("ocr", kit.respond("a b " * 250_000), "abc").score < 1e-4
