r"""What stands in a box: white space between digits, and numbers apart from their units. Tables made by hand."""

import pytest

from tinylora.tasks.build import make_scorer


def strict(answer, box):
    return make_scorer("boxed", {}).score(answer, rf"So \boxed{{{box}}}")["strict"] == 1


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("21/2", "2 1/2"),
        ("21/2", r"2\,1/2"),
        ("12", "1 2"),
        ("12", r"1\,2"),
        ("12", "1~2"),
        ("1200", "1, 200"),
        ("1,200", "1, 200"),
        ("1200", r"1,\, 200"),
        ("12 345", "12345"),
        ("15", r"1\quad 5"),
        ("1.5", "1. 5"),
    ],
)
def test_white_space_parts_numbers(answer, box):
    """All of it was dropped, so that `2 1/2` was `21/2`."""
    assert not strict(answer, box)


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("9500", r"9\,500"),
        ("9500", r"9,\!500"),
        ("9500", "9\u2009500"),
        ("9500", "9 500"),
        ("9500", r"9{,}500"),
        ("2 1/2", r"2\,1/2"),
        ("(1,2)", "(1, 2)"),
        ("(100,200)", "(100, 200)"),
        ("1, 2, 3", "1,2,3"),
        ("x+1", "x + 1"),
        ("2xy", "2x y"),
        (r"\frac{1}{2}", r"\frac 1 2"),
        ("10 100", "10 100"),
        ("12 345", "12 345"),
        ("-x", "−x"),
    ],
)
def test_white_space_that_means_nothing(answer, box):
    assert strict(answer, box)


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("9500", "9500 dollars"),
        ("18", "€18"),
        ("18", "18°"),
        ("18", r"\text{18 dollars}"),
        ("18", "18 €"),
        ("18", r"18 \$"),
        ("18", r"18^{\circ}\text{C}"),
        ("18", "18 km/h"),
        ("18", r"18 \frac{\text{km}}{\text{h}}"),
        ("18", "18cm"),
        ("18", r"18\text{cm}"),
        ("18", "18 m^2"),
        ("18", r"18 \text{ m}^{-1}"),
        ("18", "USD 18"),
        ("18", "US$18"),
        ("18", "18 percent"),
        ("18", "18 hours per day"),
        ("-5", r"-\$5"),
        ("-5", "-$5"),
        ("-5", r"\$-5"),
        ("-5", "–5"),
        ("-5", "- 5"),
        ("18", r"\mathbf{18}"),
        ("18", r"\(18\)"),
        ("18 dollars", "18"),
        ("18 dollars", r"\$18"),
        ("2 weeks", "2 week"),
        ("7 Wonders", r"\text{7 Wonders}"),
        ("5", "５"),
        ("1200", r"\text{1,200 dollars}"),
    ],
)
def test_units_are_ignored(answer, box):
    assert strict(answer, box)


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("18", "18x"),
        ("5", "5i"),
        ("5", "5 i"),
        ("2", "2 million"),
        ("2", "2 or more"),
        ("2", "2 or 3"),
        ("5", r"5 \pi"),
        ("18", "18!"),
        ("18", r"18 \times 10^3"),
        ("18", r"18 \text{ dollars and 50 cents}"),
        ("5", "5 feet 3 inches"),
        ("5", r"-\$5"),
        ("2 weeks", "2 days"),
        ("2 weeks", r"2 \text{ days}"),
        ("12 Angry Men", "12"),
        ("3", "3:00"),
        ("3", "3 dozen"),
    ],
)
def test_what_changes_a_number_is_no_unit(answer, box):
    assert not strict(answer, box)
