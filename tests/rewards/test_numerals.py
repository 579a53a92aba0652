"""Numbers as people and LaTeX write them, against values found by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mlx_posttrain.rewards.numerals import LONGEST_NUMBER, Number, last_number, only_number, plain_form


def value(text):
    number = last_number(text)
    return number and number.value


@pytest.mark.parametrize(
    "text, number",
    [
        ("about 7-8", 8),
        ("it is -5.", -5),
        ("1,234.50 in all", 1234.5),
        ("12,34", 34),
        ("1,000,000", 10**6),
        ("3.0.", 3),
        ("5-3", 3),
        ("5-3=2", 2),
        ("5 - 3", 3),
        ("(5)-3", 3),
        ("x=-3", -3),
        ("-$5", -5),
        ("$-5", -5),
        (r"-\$5", -5),
        ("$5", 5),
        ("5-$3", 3),
        ("50%", 50),
        ("0.5", 0.5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("...5", 5),
        ("\u22125", -5),
        ("COVID-19", 19),
        ("007", 7),
        ("**-2**", -2),
        ("\u0661\u0662", 12),
        ("x\u00b2", None),
        ("none", None),
        ("", None),
        ("-", None),
        ("2.20906e+07", 22090600),
        ("so 2E3.", 2000),
        ("-1e-2", -0.01),
        ("3em", 3),
        ("1e9999", 9999),
    ],
)
def test_the_last_number(text, number):
    assert value(text) == (None if number is None else Fraction(str(number)))


@pytest.mark.parametrize(
    "text, number",
    [
        ("1/2", "1/2"),
        ("1 / 2 of it", "1/2"),
        ("-3/4.", "-3/4"),
        ("1.5/3", "1/2"),
        ("2 3/4 cups", "11/4"),
        ("-2 3/4", "-11/4"),
        ("2 6/4", "3/2"),  # no mixed number
        ("2\n3/4", "3/4"),
        ("2½", "5/2"),
        ("12/25/2023", "2023"),
        ("1/0", None),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac12", "1/2"),
        (r"\tfrac 3{4}", "3/4"),
        (r"1\frac{1}{2}", "3/2"),
        (r"2-\frac{1}{2}", "1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1}{-2}", "-1/2"),
        (r"-\frac{3}{-4}", "3/4"),
        (r"\frac{1{,}000}{3}", "1000/3"),
        (r"0.1\overline{6}", "1/6"),
        (r"-2.\overline{3}", "-7/3"),
        (r"\left(\text{about } 7\right)", "7"),
        (r"\(x = - 3\)", "-3"),
        ("100{,}000", "100000"),
        (r"100\,000", "100000"),
        (r"1\;234\;567.5", "1234567.5"),
        ("1\u202f234", "1234"),
        ("1 234 567", "1234567"),
        ("the rooms 1 234", "234"),
        (r"12\,34", "34"),
        (r"\$18.50", "18.5"),
        ("€ 5", "5"),
        (r"12\%", "12"),
        (r"90^\circ", "90"),
        (r"45^{\circ}\text{C}", "45"),
        ("4 m^2", "4"),
        (r"4\text{ m}^{2}", "4"),
        ("4 m²", "4"),
        ("4 m2 or so", "4"),
        ("9.8 m s^{-2}", "9.8"),
        ("5 km/h", "5"),
        ("1011_2", "1011"),
        ("__5__", "5"),
        ("2^10", "1024"),
        ("2^{-1}", "1/2"),
        ("0^-1", None),
        ("10^{1000}", None),  # only exponents of three digits
        (r"2.2 \times 10^{7}", "22000000"),
        ("1.5 x 10^-4", "0.00015"),
        ("6 · 10³", "6000"),
        (r"10^{n}", None),
        (r"2\pi", None),
        (r"\frac{\pi}{2}", None),
        (r"\sqrt{2}", None),
        (r"\frac{1 + \sqrt{5}}{2}", None),
        ("3x^2", None),
        ("2x.", None),
        ("x < 3", None),
        ("<b>3</b> => 5", "5"),
        (r"\pm 5", None),
        ("at 5 p.m.", "5"),
        ("2 x 3 = 6", "6"),
    ],
)
def test_spellings(text, number):
    assert value(text) == (None if number is None else Fraction(number))


def test_long_numbers_stay_exact():
    assert value("9007199254740993") != value("9007199254740992")  # the same double
    # more digits than int() accepts
    assert value("1" * 5000) == value("1" * 5000) != value("1" * 4999 + "2")
    assert value("1" * LONGEST_NUMBER) is not None and value("1" * (LONGEST_NUMBER + 1)) is None


def test_what_is_read_beside_the_value():
    assert last_number("50 %") == Number(Fraction(50), percent=True)
    assert last_number("12.5 percent") == Number(Fraction(25, 2), percent=True)
    assert last_number("2.20906e+07") == Number(Fraction(22090600), digits=6)
    assert last_number("1.50e3").digits == 3 and last_number(r"1.5 \times 10^3").digits is None


@pytest.mark.parametrize(
    "text, number",
    [
        ("5 apples", 5),
        ("$1,200.", 1200),
        ("x = 5", 5),
        ("4 m^2", 4),
        (r"\frac{1}{2}", Fraction(1, 2)),
        ("2.20906e+07", 22090600),
        ("5 or 6", None),
        ("CO2", None),
        ("COVID-19", None),
        ("3/4/2020", None),
        ("2x", None),
        ("x^2 + 1", None),
        ("x - 5", None),
        ("5 + n", None),
        ("x > 5", None),
        (r"3\sqrt{2}", None),
        ("none", None),
    ],
)
def test_the_only_number(text, number):
    found = only_number(text)
    assert (found and found.value) == number


@pytest.mark.parametrize(
    "text, plain",
    [
        (r"\left\{ 1, \frac{1}{2} \right\}", "\u2983 1, 1/2 \u2984"),
        (r"[0, 2\pi) \cup (-\infty, -\tfrac{1}{2}]", "[0, 2π) ∪(-∞, -1/2]"),
        (r"\frac{1+\sqrt{5}}{2}", "(1+√5)/2"),
        (r"x^{n+1} \leq 3 \cdot 4", "x^(n+1) ≤3 ·4"),
        (r"$\text{Paris}$", "Paris"),
        (r"\mathbf{(B)}~\quad so", "(B) so"),
        ("{1, 2} and C#", "{1, 2} and C#"),
        ("", ""),
    ],
)
def test_plain_form(text, plain):
    assert plain_form(text) == plain
