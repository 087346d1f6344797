"""Answers as models write them beside truths as data sets have them: other spellings, and near misses."""

import time

import pytest

from rlcs.rewards import check_truth, kit, verify
from rlcs.rewards.answer import mixes_languages

pytestmark = pytest.mark.long

RIGHT = (
    ("physics", "1 Np", "8.686 dB"), ("physics", "32 °F", "0 °C"), ("physics", "300 K", "26.85 °C"),
    ("math", "**72**", "72"), ("math", "The answer is 72.", "72"), ("math", "答案是12", "12"),
    ("math", "\\[12\\]", "12"),
    ("math", "14 years old", "14"), ("math", "Total distance = 540 meters", "540"),
    ("math", "AB = 2\\sqrt{5}", "2√5"),
    ("math", "AB = AC = 5", "5"), ("physics", "v = \\frac{s}{t} = 5 \\text{ m/s}", "5 m/s"),
    ("math", "\\sqrt{20} = 2\\sqrt{5}", "2\\sqrt{5}"), ("math", "m + n = 17", "17"), ("math", "x = 2, 3", "2,3"),
    ("math", "2√5厘米", "2\\sqrt{5}"), ("math", "P(1, 2)", "(1,2)"), ("math", "\\langle 1, 2\\rangle", "(1,2)"),
    ("math", "x = 1, -2 \\pm i", "1, -2+i, -2-i"), ("math", "∠B", "\\angle B"), ("math", "AB⊥CD", "AB \\perp CD"),
    ("vqa", "02139.", "02139"), ("math", "x<-1 \\text{ or } x>3", "(-\\infty,-1)\\cup(3,\\infty)"),
    ("math", "3 to 5", "3:5"),
    ("math", "11001₂", "11001_2"), ("math", "11001", "11001_{2}"), ("math", "Yes, it is even", "Yes"),
    ("physics", "a = 2.5\\,\\mathrm{m\\,s^{-2}}", "2.5 \\text{ m/s}^2"),
    ("physics", "t \\approx 1.43\\,\\text{s}", "1.43 s"),
    ("physics", "1800s", "1800 s"), ("chemistry", "\\mathrm{SO_4^{2-}}", "SO4^2-"),
    ("chemistry", "O2 + 2H2 → 2H2O", "2H_2 + O_2 \\rightarrow 2H_2O"),
    ("chemistry", "Zn + 2H+ → Zn2+ + H2", "2H^+ + Zn \\xrightarrow{} H2 + Zn^{2+}"),
    ("geography", "38 million people", "38 million"), ("geography", "In 1936", "1936"),
    ("chart", "The year 2015", "2015"), ("chart", "the 1990s", "1990s"), ("chart", "Asia & Africa", "[Asia, Africa]"),
    ("chart", "$4.1 billion", "4.1 billion U.S. dollars"), ("counting", "**5**", "5"), ("counting", "None", "0"),
    ("counting", "There are no cars.", "0"), ("counting", "There are 3", "3"), ("counting", "only one", "1"),
    ("counting", "图中有3只猫", "3"), ("vqa", "USD 1,234.56", "$1,234.56"), ("vqa", "Yes, the light is on.", "yes"),
    ("vqa", "No, it is not raining", "No"), ("vqa", "60 s", "1 min"), ("spatial", "120 cm", "1.2 m"),
    ("vqa", "555-123-4567", "(555) 123-4567"), ("vqa", "12 / 05 / 2023", "12/05/2023"),
    ("vqa", "in the kitchen", "kitchen"),
    ("spatial", "on the left side", "left"), ("spatial", "lamp, desk, and bed", "lamp, desk, bed"),
    ("video", "00:01:23", "1:23"), ("video", "00:15:30", "15:30"),
    ("video", "3→1→2", "3, 1, 2"), ("geoguess", "Zurich", "Zürich"),
    ("long_document", "3rd of March 2015", "March 3, 2015"), ("long_document", "$3.2M", "$3.2 million"),
    ("long_document", "Acme, Bolt and Core", "['Acme', 'Bolt', 'Core']"), ("choice", "（D）", "D"),
    ("choice", "Figure D", "D"),
    # names with subscripts, Greek letters and primes in front of a measurement
    ("physics", "v_{\\text{max}} = 5.02 m/s", "5 m/s"), ("physics", "F_{net} = 5.01 N", "5 N"),
    ("physics", "\\Delta H = -285.8 kJ/mol", "-286 kJ/mol"), ("physics", "Δx = 5.01 m", "5 m"),
    ("physics", "v' = 5.01 m/s", "5 m/s"), ("math", "面积=24平方厘米", "24"), ("math", "m∠A = 50°", "50°"),
    # several measurements: each by itself
    ("physics", "2.51 m/s², 10 N", "2.5 m/s^2, 10 N"), ("physics", "250 cm/s² and 10 N", "2.5 m/s^2, 10 N"),
    ("physics", "T2 = 20 N, T1 = 10.05 N", "T1 = 10 N, T2 = 20 N"), ("physics", "x = 1 m, x = 3 m", "x = 3 m, x = 1 m"),
    ("physics", "1 s or 3 s", "3 s or 1 s"), ("physics", "(1) 2.5 m/s² (2) 10 N", "2.5 m/s², 10 N"),
    ("math", "(1) 5; (2) 6", "5, 6"), ("math", "① 5 ② 6", "(1) 5 (2) 6"), ("math", "k=2, b=-1", "2, -1"),
    ("math", "5 hours 30 minutes", "330 minutes"), ("math", "1小时15分钟", "75分钟"),
    ("math", "3 feet 6 inches", "42 in"),
    ("video", "2 minutes and 5 seconds", "125 s"), ("vqa", "3 years", "36 months"),
    ("physics", "6 N, to the right", "6 N to the right"), ("physics", "5000 mH", "5 H"),
    ("physics", "600 r/min", "10 rev/s"), ("physics", "31.4 rad/s", "31.4 s^-1"), ("physics", "0.5 s^-1", "0.5 Hz"),
    ("physics", "\\frac{q}{4\\pi\\epsilon_0}", "\\frac{q}{4\\pi\\varepsilon_0}"), ("math", "ϕ", "\\varphi"),
    ("chemistry", "3H2 + N2 <=> 2NH3", "N_2 + 3H_2 \\rightleftharpoons 2NH_3"),
    ("chemistry", "2H2(g) + O2(g) → 2H2O(l)", "2H2 + O2 → 2H2O"),
    ("chemistry", "Ca2+ + CO3^{2-} == CaCO3", "Ca^{2+} + CO_3^{2-} = CaCO_3\\downarrow"),
    ("geography", "1:50,000", "1:50000"), ("math", "△ABC≌△DEF", "\\triangle ABC \\cong \\triangle DEF"),
    ("math", "\\frac{π}{3} + kπ, k∈Z", "k\\pi + \\frac{\\pi}{3} (k \\in \\mathbb{Z})"),
    ("math", "all real numbers", "\\mathbb{R}"), ("math", "全体实数", "(-\\infty, \\infty)"),
    ("math", "(-\\infty, 1) \\cup (1, \\infty)", "x \\neq 1"), ("math", "{x ∈ R | x ≠ 1}", "x ≠ 1"),
    ("math", "x ≠ -1 and x ≠ 2", "(-∞,-1)∪(-1,2)∪(2,∞)"),
    ("math", "\\frac{dy}{dx} = 2x", "2x"), ("math", "y'=2x", "2x"), ("math", "(2; -3)", "(2,-3)"),
    ("math", "log₂3", "\\log_2 3"), ("math", "minus 5", "-5"), ("vqa", "零下5℃", "-5°C"),
    ("chemistry", "④①③", "①③④"), ("choice", "①、③和④", "①③④"),
    ("chart", "45 - 30 = 15", "15"), ("counting", "5 + 3 = 8", "8"), ("counting", "没有", "0"),
    ("chart", "52 meters", "52 m"), ("chart", "Jan 2019", "January 2019"), ("chart", "20 to 29", "20-29"),
    ("vqa", "₹500", "500 rupees"), ("chart", "Rs. 500", "₹500"), ("vqa", "July 4th", "4 July"),
    ("vqa", "Yes. The light is on", "yes"), ("vqa", "不，没有猫", "否"), ("choice", "正确答案是B", "B"),
    ("counting", "exactly 3", "3"), ("counting", "Exactly three.", "3"), ("counting", "There are exactly 3 cats", "3"),
    ("counting", "three (3)", "3"), ("counting", "3 (three)", "3"), ("counting", "Three (3) cats", "3"),
    ("counting", "a dozen", "12"), ("counting", "two dozen eggs", "24"), ("counting", "3 thousand", "3000"),
    ("math", "a dozen", "12"), ("math", "does not exist", "DNE"), ("math", "The limit doesn't exist.", "DNE"),
    ("math", "no solution", "\\emptyset"), ("math", "No solutions", "no solution"), ("math", "$\\varnothing$", "无解"),
    ("math", "11_{10}", "11"), ("math", "11", "11_{10}"),
    ("vqa", "\u200bdog", "dog"), ("math", "4\\sqrt{5} \\text{ units}", "4√5"),
    ("math", "6√3 square units", "6\\sqrt{3}"),
    ("math", "3/11 ≈ 0.2727", "3/11"), ("math", "6√3 ≈ 10.39", "10.39"),
    ("physics", "t = \\sqrt{2} s ≈ 1.41 s", "1.41 s"),
    ("math", "x = 2 \\quad y = 3", "x = 2, y = 3"), ("math", "12公顷", "12"), ("math", "1.2平方分米", "120平方厘米"),
    ("physics", "0.5毫安", "0.5 mA"), ("math", "12元/千克", "12"), ("math", "$15 per hour", "15"),
    ("math", "$15/hour", "15"), ("vqa", "John.Smith@mail.com", "john.smith@mail.com"),
    ("math", "5吨300千克", "5.3吨"), ("math", "2元5角", "2.5元"), ("math", "√", "对"), ("math", "错误", "×"),
    ("choice", "答案选D", "D"), ("chemistry", "AgCl(s) ⇌ Ag^+(aq) + Cl^-(aq)", "AgCl ⇌ Ag+ + Cl-"),
    ("vqa", "✓", "yes"), ("math", "3比2", "3:2"),
    ("math", "6 remainder 3", "6 R 3"), ("math", "6 \\text{ R } 3", "6R3"), ("math", "27 ÷ 4 = 6……3", "6余3"),
    ("vqa", "दिल्ली", "दिल्ली."), ("vqa", "كتب", "كَتَبَ"), ("math", "\\ln 8", "3\\ln 2"),
    ("math", "\\cos 60^\\circ", "\\sin 30^\\circ"), ("math", "\\arctan 1", "\\frac{\\pi}{4}"),
    ("math", "\\bigl(1,2\\bigr)", "(1,2)"), ("physics", "2 N·m/s", "2"), ("vqa", "10 am", "10 AM"),
    ("vqa", "10 PM", "10 pm"), ("chart", "5 KG", "5 kg"), ("chart", "30 mw", "30 MW"), ("vqa", "H2O", "H₂O"),
    ("vqa", "x2", "x²"), ("vqa", "5^{2}", "5²"), ("vqa", "10^-3", "10⁻³"), ("vqa", "\\log_2 8", "log₂8"),
    ("vqa", "snake case", "snake_case"), ("vqa", "1920x1080", "1920 × 1080"), ("chart", "1,000,000", "10⁶"),
    # names, roots of what is measured, numbers behind words, days
    ("math", "BA = 5", "AB = 5"), ("math", "\\angle CBA = 30°", "\\angle ABC = 30°"),
    ("math", "\\angle B = 30°", "\\angle ABC = 30°"), ("math", "∠1 = 30°", "\\angle 1 = 30^\\circ"),
    ("physics", "v_{m} = 5 m/s", "v_{max} = 5 m/s"), ("physics", "v = 5 m/s", "v_{max} = 5 m/s"),
    ("physics", "speed = 5 m/s", "v = 5 m/s"), ("physics", "A = 24 cm^2", "S = 24 cm^2"),
    ("physics", "R_{total} = 6 Ω", "R_{eq} = 6 Ω"), ("physics", "v_i = 6 m/s", "v_0 = 6 m/s"),
    ("physics", "v0 = 6 m/s", "v_0 = 6 m/s"), ("chemistry", "pK_a = 4.7", "pKa = 4.7"),
    ("physics", "\\frac{1}{B}\\sqrt{\\frac{2mU}{q}}", "\\sqrt{\\frac{2mU}{qB^2}}"),
    ("physics", "v = \\frac{\\sqrt{GM}}{\\sqrt r}", "v = \\sqrt{\\frac{GM}{r}}"),
    ("physics", "\\frac{\\sqrt{mk}}{k}", "\\sqrt{\\frac mk}"),
    ("physics", "\\sqrt{\\frac{2hd^2}{g}}", "d\\sqrt{\\frac{2h}{g}}"),
    ("physics", "nRT(\\ln V_2-\\ln V_1)", "nRT\\ln\\frac{V_2}{V_1}"), ("chemistry", "Carbon-14", "carbon-14"),
    ("chemistry", "carbon 14", "Carbon-14"), ("biology", "COVID-19", "Covid-19"),
    ("biology", "Type-2 diabetes", "type-2 diabetes"), ("chart", "3 March 2015", "March 3, 2015"),
    ("math", "3 March 2015", "March 3, 2015"), ("biology", "3rd of March 2015", "March 3, 2015"),
    ("geography", "March 3", "3 March"),
    # two values in brackets, sides and directions, units as books of chemistry write them
    ("math", "\\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}", "\\frac{-b±\\sqrt{b^2-4ac}}{2a}"),
    ("math", "x = \\frac{3 \\pm \\sqrt{5}}{2}", "x=\\frac{3+\\sqrt{5}}{2}, x=\\frac{3-\\sqrt{5}}{2}"),
    ("math", "(\\pm\\sqrt 3, 0)", "(\\sqrt3,0), (-\\sqrt 3,0)"), ("math", "12.50美元", "\\$12.50"),
    ("math", "3.46", "\\approx 3.46"), ("math", "\\frac{\\pi}{4} rad", "\\frac{\\pi}{4}"),
    ("math", "60°、120°", "120°, 60°"), ("physics", "to the right", "right"),
    ("physics", "5 m/s, due east", "5 m/s to the east"), ("physics", "5 m/s，方向向东", "5 m/s 向东"),
    ("physics", "273 K", "0 °C"), ("chemistry", "0.1 mol·L-1", "0.1 mol/L"),
    ("chemistry", "-57.3 kJ·mol-1", "-57.3 kJ/mol"), ("geography", "西北", "西北方向"), ("spatial", "左边", "左侧"),
    ("spatial", "left", "on the left-hand side"), ("vqa", "http://www.example.com/", "www.example.com"),
    ("choice", "B选项", "B"),
    # what holds at once, and what stands behind the work
    ("math", "3个", "3"), ("math", "6:30", "06:30"), ("math", "50¢", "50 cents"),
    ("math", "\\sum_{i=1}^{3} i = 6", "6"), ("math", "\\frac{d}{dx}(x^2) = 2x", "2x"), ("math", "A∩B={1}", "\\{1\\}"),
    ("math", "\\{(1,2)\\}", "(1,2)"), ("math", "\\frac{1}{2}\\sin 2x", "sinxcosx"),
    ("math", "[-2,1)∪(1,+∞)", "x≥-2且x≠1"), ("math", "k≠0且k<1", "(-∞,0)∪(0,1)"), ("math", "a=1且b=2", "a=1, b=2"),
    # isotopes, and numbers by the ten thousand
    ("chemistry", "¹⁴C", "14C"), ("chemistry", "^{14}_6C", "^{14}\\text{C}"),
    ("chemistry", "{}^{238}_{92}U → {}^{234}_{90}Th + {}^4_2He", "^{238}U \\rightarrow ^{234}Th + ^4He"),
    ("geography", "960万平方公里", "9.6 million km²"),
    ("math", "5万元", "50000元"), ("chart", "3.5百万", "3.5 million"),
    ("physics", "4倍", "4"),
    ("math", "AB与CD的距离=5", "5"), ("physics", "0 m", "0 m/s"),
)  # fmt: skip
WRONG = (
    # Units that no factor turns into one another: no error either, which an answer may not choose over a zero.
    ("physics", "5 Ym^12*Zm^14/m^25", "5 m"), ("physics", "3 B", "3 dB"), ("physics", "1 W", "30 dBm"),
    ("physics", "3859.5 dBm", "1 W"),
    ("math", "The answer is not 72", "72"), ("math", "The answer is 72 or 73", "72"),
    ("math", "x=1 y=2", "2"), ("math", "None", "0"),
    ("math", "x^2-4=0", "0"), ("math", "5", "x+y=5"), ("math", "CD", "AB=CD"), ("math", "x=3, -1", "x=3, y=-1"),
    ("math", "length or width = 5", "5"), ("math", "1101_3", "1101_2"), ("math", "1011", "1101_2"),
    ("math", "y=(a+3+2)*c", "y=(a+2)*c+3"), ("math", "y=e^{x+3+2}", "y=e^{x+2}+3"), ("math", "5 to 3", "3:5"),
    ("math", "-2 \\pm i", "1, -2+i, -2-i"), ("math", "∠A", "\\angle B"), ("math", "AB⊥CD", "AB \\parallel CD"),
    ("vqa", "2139", "02139"), ("math", "x<-1 or x>4", "(-\\infty,-1)\\cup(3,\\infty)"),
    ("math", "Yes, it is not", "no"),
    ("chemistry", "Fe2+ + Ce → Fe + Ce2+", "Fe2 + Ce+ → Fe + Ce2+"),
    ("chemistry", "2H2O → 2H2 + O2", "O2 + 2H2 → 2H2O"),
    ("geography", "1980s", "1980"), ("chart", "1980s", "1980"), ("chart", "1980", "1980s"), ("vqa", "1990s", "1990"),
    ("counting", "There are no more than 5", "0"), ("counting", "There are no fewer than two", "0"),
    ("counting", "none of these", "0"), ("counting", "only 3 or 4", "3"), ("vqa", "Yes but no", "yes"),
    ("vqa", "Yes, not really", "yes"), ("vqa", "No, I think yes", "no"), ("vqa", "5 min", "5 s"), ("vqa", "€5", "$5"),
    ("vqa", "555-123-4576", "(555) 123-4567"), ("vqa", "10 20 30 40", "10.20 30.40"), ("vqa", "1:23", "11:23"),
    ("spatial", "in the box", "on the box"), ("spatial", "bed, desk, lamp", "lamp, desk, bed"),
    ("long_document", "3 May 2015", "March 5, 2015"), ("long_document", "$3.2", "$3.2 million"),
    ("chemistry", "①②④", "①②③"), ("math", "(1) 6; (2) 5", "5, 6"),
    ("math", "(1) B (2) A", "(1) A (2) B"), ("physics", "10, 2.5", "2.5, 10"),
    ("physics", "20 N, 10 N", "T1 = 10 N, T2 = 20 N"), ("physics", "T1 = 20 N, T2 = 10 N", "T1 = 10 N, T2 = 20 N"),
    ("math", "k=-1, b=2", "2, -1"), ("math", "5 hours 30 minutes", "5.3 hours"), ("math", "30 min 5 h", "5 h 30 min"),
    ("math", "1 hour 75 minutes", "2 hours 15 minutes"), ("counting", "2 hours 30 minutes", "2"),
    ("vqa", "5 is wrong", "5"), ("counting", "5 is not it", "5"), ("chart", "5 not", "5"),
    ("counting", "five is wrong", "5"), ("vqa", "5₽", "$5"),
    ("physics", "wrong = 5 N", "5 N"), ("vqa", "5", "±5"), ("vqa", "5\"", "5'"), ("vqa", "5¢", "$5"),
    ("vqa", "₹500", "$500"), ("physics", "5 rad/s", "5 Hz"), ("physics", "5 h", "5 H"), ("physics", "r", "R"),
    ("physics", "6 N, to the left", "6 N to the right"), ("chemistry", "2NH3 ⇌ N2 + 3H2", "N2 + 3H2 ⇌ 2NH3"),
    ("chemistry", "2H2(g) + O2(g) → 2H2O(l)", "2H2(g) + O2(g) → 2H2O(g)"), ("geography", "1:5,000", "1:50000"),
    ("math", "kπ + π/6, k∈Z", "k\\pi + \\frac{\\pi}{3} (k \\in \\mathbb{Z})"), ("math", "r", "\\mathbb{R}"),
    ("math", "kπ + π/3, k∈N", "k\\pi + \\frac{\\pi}{3} (k \\in \\mathbb{Z})"),
    ("math", "all real numbers", "(0, \\infty)"),
    ("math", "x ≠ 1", "(-\\infty, 1)\\cup[1,\\infty)"), ("math", "log₂3", "\\log_3 2"),
    ("vqa", "A-", "A"), ("vqa", "p ∧ ¬q", "p ∧ q"), ("math", "y = 5 \\quad x = 6", "6"), ("math", "x ≈ 3", "≈ 4"),
    ("math", "\\lfloor 6.5 \\rfloor", "6"), ("math", "\\operatorname{lcm}(2, 3)", "6"), ("math", "5 ≈ 6", "6"),
    ("math", "\\binom{5}{2}", "10"), ("math", "13 \\bmod 7", "6"), ("math", "√30 ≈ 6", "√35"),
    ("math", "×", "√"), ("vqa", "×", "yes"), ("math", "12元/千克", "12元"), ("math", "2元5角", "2.05元"),
    ("math", "3比2", "2:3"), ("vqa", "john.smith@mail.com", "johnsmith@mail.com"), ("vqa", "www.a-b.com", "www.ab.com"),
    ("vqa", "O", "O-"), ("vqa", "July 5", "July 4"), ("vqa", "Yes. But no.", "yes"),
    ("chart", "Mar", "May"),
    ("counting", "three (4)", "3"), ("counting", "3 (or four)", "3"), ("counting", "a dozen", "1"),
    ("counting", "3 thousand", "3"), ("counting", "exactly", "3"), ("counting", "3 (thousand)", "3"),
    ("math", "one solution", "\\emptyset"), ("math", "DNE", "\\emptyset"), ("math", "0", "no solution"),
    ("math", "11_{2}", "11"), ("math", "11_{10}", "11_{2}"), ("math", "DNE", "0"),
    ("math", "9 R 2", "6 R 3"), ("math", "18R", "6 R 3"), ("math", "6.75", "6 R 3"), ("vqa", "का", "की"),
    ("biology", "दीन", "दिन"), ("chart", "दलल", "दिल्ली"), ("video", "ไม", "ไม่"), ("vqa", "கால்", "கல்"),
    ("math", "\\begin{vmatrix}17&0\\\\0&23\\end{vmatrix}", "391"), ("math", "\\frac{d}{dx}391x", "391"),
    ("math", "390+\\sin^2x+\\cos^2x", "391"), ("math", "391\\cdot\\cos 0", "391"), ("math", "e^{\\ln 391}", "391"),
    ("math", "391x/x", "391"), ("math", "391x^0", "391"), ("math", "|-391|", "391"), ("math", "\\log_{10} 100", "2"),
    ("math", "\\log_4 8", "\\frac{3}{2}"), ("math", "\\frac{\\ln 8}{\\ln 2}", "3"), ("math", "\\tan 45°", "1"),
    ("math", "\\cos 30^\\circ", "\\frac{\\sqrt{3}}{2}"), ("math", "{17 \\choose 1}", "17"),
    ("math", "\\Gamma(5)", "24"), ("chart", "30 mW", "30 MW"), ("spatial", "3 MPa", "3 mPa"),
    ("spatial", "5 Mm", "5 mm"), ("vqa", "100 mbps", "100 Mbps"), ("vqa", "100 MB", "100 Mb"), ("vqa", "52", "5²"),
    ("vqa", "34", "3*4"), ("vqa", "34", "3_4"), ("vqa", "19201080", "1920×1080"), ("vqa", "log28", "log₂8"),
    ("chart", "102", "10²"),
    ("chemistry", "pOH = 7", "pH = 7"), ("math", "\\angle B = 30°", "\\angle A = 30°"),
    ("math", "∠1 = 30°", "∠2 = 30°"), ("math", "∠ABD = 30°", "∠ABC = 30°"),
    ("physics", "v_{min} = 5 m/s", "v_{max} = 5 m/s"), ("physics", "E_p = 5 J", "E_k = 5 J"),
    ("math", "CD = 5", "AB = 5"), ("math", "x_2 = 5", "x_1 = 5"), ("math", "\\sqrt{x^2}", "x"),
    ("physics", "|x|", "x"), ("physics", "\\sqrt{\\frac{2hd}{g}}", "d\\sqrt{\\frac{2h}{g}}"),
    ("chemistry", "carbon-12", "carbon-14"), ("math", "mgh-2", "MGH-2"), ("chart", "4 March 2015", "March 3, 2015"),
    ("geography", "3 May", "3 March"),
    ("math", "\\frac{3 + \\sqrt{5}}{2}", "\\frac{3 \\pm \\sqrt{5}}{2}"), ("math", "\\frac{3 \\pm 1}{2}", "1, 2"),
    ("chart", "about 60", "about 50"), ("physics", "5 m/s, due west", "5 m/s to the east"),
    ("physics", "303 K", "27 °C"), ("math", "273 K", "0 °C"), ("chemistry", "0.1 mol·L-1", "0.1 mol·L-2"),
    ("math", "5", "5m-2"), ("math", "10‰", "10"), ("spatial", "左边", "右侧"), ("spatial", "right", "on the left"),
    ("spatial", "bottom left", "left"), ("vqa", "K♠", "K♥"), ("vqa", "male ♂", "male ♀"),
    ("math", "\\sum_{i=1}^{10} i = 56", "55"), ("math", "55 = \\sum_{i=1}^{10} i", "55"),
    ("math", "k<1或k≠0", "k<1且k≠0"), ("math", "(-\\infty,1)", "k<1且k≠0"), ("math", "a=1且b=3", "a=1且b=2"),
    ("physics", "5个", "5 N"), ("math", "16:30", "06:30"),
    ("chemistry", "¹⁴C", "12C"), ("math", "X2Y", "X^2Y"), ("math", "5万元", "5元"), ("geography", "14亿", "14"),
    ("counting", "3万", "3"),
    ("physics", "(5-5) m", "0 m"), ("math", "x-x", "0"), ("math", "a=1且b=2", "2"), ("math", "a=1和b=2", "2"),
    ("vqa", "v = 6 m/s 且 u = 5 m/s", "5"), ("math", "5, \\sum_{i=1}^{3} i = 6", "6"),
    ("math", "\\frac{1}{B}\\sqrt{2} 且 AB = AC = 5", "x_1 = 5"),
)  # fmt: skip


@pytest.mark.parametrize(("expect", "domain", "answer", "truth"), [(0, *x) for x in WRONG] + [(1, *x) for x in RIGHT])
def test_other_spellings_and_near_misses(expect, domain, answer, truth):
    verdict = verify(domain, kit.respond(answer), truth)
    assert (verdict.outcome, verdict.score) == (("score", 1) if expect else ("wrong", 0)), verdict.detail


NOTICE = (
    "本馆开放时间为每周二至周日上午九时至下午五时，周一闭馆。请勿携带易燃易爆物品入馆，参观时请保持安静，谢谢您的合作。"
)
NOTICE_TOO = (
    "The museum is open from Tuesday to Sunday, nine to five, and closed on Monday. Please do not bring inflammable "
    "goods and keep quiet during your visit. Thank you for your cooperation."
)


def test_what_a_picture_shows_may_mix_languages_and_repeat_itself():
    for text in (f"{NOTICE}\n{NOTICE_TOO}", "| item | 1 | 2 | 3 | 0.00 | no |\n" * 40):
        assert verify("ocr", kit.respond(text), text).score == 1
    thinking = (
        f'It is a notice in Chinese. It reads "{NOTICE}", black on white, and I copy it with all its signs as it is.'
    )
    assert not mixes_languages(thinking) and mixes_languages(thinking.replace('"', ""))


def test_a_long_text_takes_no_minutes_at_the_gates():
    """Signs that open and never close: work that grows with the square of the length would take minutes here."""
    start = time.process_time()
    for sign in ("\\(", "\\[", "<|", "“", '"', "$"):
        assert not mixes_languages("中" + sign * 50_000)
    assert time.process_time() - start < 10


def test_a_click_beside_its_own_box_is_a_truth_that_answers_can_meet():
    """As in GLM-4.1V's own examples, where the middle of a target is rounded."""
    truth = "CLICK(point=(230, 100), box=[[198, 92, 229, 107]], element_info='D')"
    check_truth("gui_web", truth)
    assert verify("gui_web", kit.respond("CLICK(point=(214, 100))"), truth).score == 1
    with pytest.raises(ValueError, match="must be right as its own answer"):
        check_truth("gui_android", '{"action_type": "click", "box_2d": [[100, 200, 1300, 2400]]}')


@pytest.mark.parametrize(
    ("expect", "domain", "answer", "truth"),
    [
        (0, "gui_android", "[[550, 550]]", "[[500, 500, 600, 600]]"),
        (0, "gui_android", "[]", "[[500, 500, 600, 600]]"),
        (0.25, "gui_android", "[[500, 500, 550, 550]]", "[[500, 500, 600, 600]]"),
        (1, "gui_android", "[[550, 550]]", "[[550, 550]]"),
        (0, "gui_web", "CLICK(box=[[550, 550]])", "CLICK(box=[[500, 500, 600, 600]])"),
        (1, "gui_os", "left_click(start_box='[550, 550]')", "left_click(start_box='[500, 500, 600, 600]')"),
    ],
)  # fmt: skip
def test_a_point_is_no_box(expect, domain, answer, truth):
    """It would lie in the box, and be worth more than an honest box."""
    click = '{{"action_type": "click", "box_2d": {}}}' if domain == "gui_android" else "{}"
    assert verify(domain, kit.respond(click.format(answer)), click.format(truth)).score == expect
