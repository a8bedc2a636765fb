# ruff: noqa: E501 (tables of inputs, a line each)
r"""Replies that a scorer read as another number, word or value than a reader would (points 3, 4, 5, 10, 11, rough)."""

import tomllib

from bench.common import ROOT
from bench.trust.robustness_cases.inputs import scored

THIN, NARROW, NO_BREAK, MINUS, EN = "\u2009", "\u202f", "\u00a0", "\u2212", "\u2013"
HASHES = tomllib.loads((ROOT / "recipes" / "gsm8k-lm-eval.toml").read_text())["task"]["scorer_options"]
FINAL = {"style": "final"}

# 3: white space between digits joins groups of three alone, and then outside of a box, too
scored(
    "03",
    ("boxed", "21/2", r"\boxed{2 1/2}", 0), ("boxed", "12", r"\boxed{1 2}", 0), ("boxed", "1200", r"\boxed{1, 200}", 0),
    ("boxed", "12", r"\boxed{1\ 2}", 0), ("boxed", "12", r"\boxed{1\,2}", 0), ("boxed", "12", r"\boxed{1~2}", 0),
    ("boxed", "12", "\\boxed{1\n2}", 0), ("boxed", "1234", r"\boxed{12\,34}", 0), ("boxed", "42", r"\boxed{4 \; 2}", 0),
    ("boxed", "3.5", r"\boxed{3 .5}", 0), ("boxed", "12", r"\boxed{1 2 \text{ cm}}", 0),
    ("boxed", "x^{12}", r"\boxed{x^{1 2}}", 0), ("boxed", "1200", r"\boxed{1,200}", 1, 1),
    ("boxed", "9500", r"\boxed{9\,500}", 1, 1), ("boxed", "9500", r"\boxed{9{,}500}", 1, 1),
    ("boxed", "9500", r"\boxed{9,\!500}", 1, 1), ("boxed", "9500", rf"\boxed{{9{THIN}500}}", 1, 1),
    ("boxed", "9500", rf"\boxed{{9{NARROW}500}}", 1, 1), ("boxed", "1000000", r"\boxed{1\,000\,000}", 1, 1),
    ("boxed", r"\frac{1}{2}", r"\boxed{ \frac{1} {2} }", 1), ("boxed", "(1,2)", r"\boxed{(1, 2)}", 1),
    ("boxed", "9500", r"So there are 9\,500 in all.", 0, 1), ("boxed", "500", r"So there are 9\,500 in all.", 0, 0),
    ("boxed", "9500", r"So there are 9,\!500 in all.", 0, 1), ("boxed", "9500", f"There are 9{THIN}500.", 0, 1),
    ("number", "500", r"That makes 9\,500.", 0, 0), ("number", "9500", f"That makes 9{NARROW}500.", 0, 1),
    ("number", "500", f"That makes 9{THIN}500.", 0, 0),
)  # fmt: skip
scored(
    "03", ("number", "500", r"The answer is 9\,500", 0, 0), ("number", "9500", r"The answer is 9\,500", 1, 1),
    ("number", "9500", f"The answer is 9{THIN}500", 1, 1), ("number", "500", r"The answer is 9,\!500", 0, 0), options=FINAL,
)  # fmt: skip
scored("03", ("regex", "12", "answer: 1 2", 0), options={"pattern": "answer: (.*)"})

# 4: a sign before a currency sign, as an en dash, or before a space
scored(
    "04",
    ("number", "5", "The profit is -$5.", 0, 0), ("number", "-5", "The profit is -$5.", 1, 1),
    ("number", "-5", f"The change is {EN}5.", 1, 1), ("number", "5", f"The change is {EN}5.", 0, 0),
    ("number", "5", "The answer is - 5", 0, 0), ("number", "-5", "It is $-5", 1, 1), ("number", "5", "It is $-5", 0, 0),
    ("number", "-5", "It is -€5", 1, 1), ("number", "5", f"It is {MINUS}£5", 0, 0), ("number", "5", r"It is -\$5", 0, 0),
    ("number", "5", "It is - $5", 0, 0), ("number", "-5", f"It is {MINUS}5", 1, 1), ("number", "-1200", "-$1,200", 1, 1),
    ("number", "5", "The profit is $5.", 1, 1), ("number", "15", f"pages 10{EN}15", 0, 1), options=FINAL,
)  # fmt: skip
scored(
    "04",
    ("number", "5", f"{EN}5", 0, 0), ("number", "-5", "a loss of -$5 in all", 0, 1),
    ("number", "5", "a loss of -$5 in all", 0, 0), ("number", "-15", f"pages 10{EN}15", 0, 0),
    ("boxed", "5", r"\boxed{-\$5}", 0, 0), ("boxed", "-5", r"\boxed{-\$5}", 1, 1), ("boxed", "-5", r"\boxed{-$5}", 1, 1),
    ("boxed", "5", rf"\boxed{{{EN}5}}", 0, 0), ("boxed", "-5", r"\boxed{- 5}", 1, 1), ("boxed", "5", r"\boxed{- 5}", 0, 0),
    ("boxed", "5", "That leaves -$5.", 0, 0), ("boxed", "3", r"\boxed{-€3}", 0, 0),
)  # fmt: skip
scored(
    "04",
    ("regex", "-3", "So #### -$3", 0, 1), ("regex", "3", "So #### -$3", 0, 0),
    ("regex", "3", f"So #### {MINUS}$3", 0, 0), ("regex", "3", f"So #### {EN}3", 0, 0), ("regex", "-3", "So #### -3", 1, 1),
    ("regex", "3", "So #### 3", 1, 1), ("regex", "1200", "So #### 1,200.", 1, 1), options=HASHES,
)  # fmt: skip

# 5: an operand is no answer
scored(
    "05",
    ("number", "10", r"5 \times 10", 0), ("number", "-3", "5 -3", 0), ("number", "3", "5 -3", 0),
    ("number", "3", "1, 2, 3", 0), ("number", "10", r"5 \cdot 10", 0), ("number", "10", r"50 \div 10", 0),
    ("number", "10", "5 * 10", 0), ("number", "10", "5 · 10", 0), ("number", "10", "5 ⋅ 10", 0), ("number", "3", f"5 {EN} 3", 0),
    ("number", "-3", f"5 {EN}3", 0), ("number", "-3", f"5 {MINUS}3", 0), ("number", "3", "5 +3", 0), ("number", "10", "2 ** 10", 0),
    ("number", "10", "2^10", 0), ("number", "10", "5 ∗ 10", 0), ("number", "3", r"x \pm 3", 0), ("number", "3", "4; 2; 3", 0),
    ("number", "10", "5 × $10", 0), ("number", "3", "(5) - 3", 0), ("number", "50", r"5 \times 10 = 50", 1),
    ("number", "42", "17 + 25 = 42.", 1), ("number", "-3", "5 - 8 = -3", 1), ("number", "3", "Answer: 3", 1),
    ("number", "1200", "The answer is 1,200", 1), ("number", "3", "So, 3", 1), ("number", "-3", "x = -3", 1),
    ("number", "7", "We have 3, so the answer is 7", 1), ("number", "5", "5 × 1 = 5", 1), ("number", "9", "The total is $9.", 1),
    options=FINAL,
)  # fmt: skip

# 10: words and numbers have boundaries, by their script
scored(
    "10",
    ("contains", "1", "It is 1.5", 0, 0), ("contains", "1", "It is 1,000", 0, 0), ("contains", "5", "It is -5", 0, 0),
    ("contains", "5", f"It is {MINUS}5", 0, 0), ("contains", "5", "It is 3.5.", 0, 0), ("contains", "000", "It is 1,000", 0, 0),
    ("contains", "5", "It is 5.", 1, 1), ("contains", "5", "It is 5, I think", 1, 1), ("contains", "-5", "It is -5.", 1, 1),
    ("contains", "1.5", "It is 1.5, no more", 1, 1), ("contains", "1,000", "It is 1,000.", 1, 1), ("contains", "5", "15", 0, 0),
    ("contains", "東京", "答えは東京です", 1, 1), ("contains", "北京", "首都是北京。", 1, 1), ("contains", "กรุงเทพ", "คำตอบคือกรุงเทพครับ", 1, 1),
    ("contains", "5", "答えは5です", 1, 1), ("contains", "5", "答えは15です", 0, 0), ("contains", "cat", "これはcatです", 1, 1),
    ("contains", "cat", "concatenate", 0, 0), ("contains", "Paris", "It is Paris, of course.", 1, 1), ("contains", "さくら", "これはさくらだ", 1, 1),
    ("contains", "art", "a party", 0, 0), ("contains", "Zürich", "in Zu\u0308rich.", 1, 1), ("contains", "कल", "कलम", 0, 0),
    ("contains", "C++", "I like C++ best", 1, 1), ("exact", "1", "It is 1.5", 0, 0), ("exact", "5", "It is -5", 0, 0),
    ("exact", "東京", "答えは東京です", 0, 1), ("exact", "1", "1,000", 0, 0), ("exact", "東京", "東京", 1, 1), ("exact", "5", "5", 1, 1),
    ("exact", "Paris", "It is paris.", 0, 1), ("boxed", "東京", "答えは東京です", 0, 1),
)  # fmt: skip
scored("10", ("regex", "東京", "首都は東京です", 0, 1), options={"pattern": "answer: (.*)"})

# 11: decimals of a gold stay decimals
PRECISE = "0.123456789012345678901"
for name, gold, reply, strict in (
    ("21 digits", f'{{"x": {PRECISE}}}', f'{{"x": {PRECISE}}}', 1),
    ("21 digits, the last another", f'{{"x": {PRECISE}}}', f'{{"x": {PRECISE[:-1]}2}}', 0),
    ("21 digits as a text of JSON", f'"{{\\"x\\": {PRECISE}}}"', f'{{"x": {PRECISE}}}', 1),
    ("nested", f'{{"a": {{"x": [{PRECISE}]}}}}', f'{{"a": {{"x": [{PRECISE}]}}}}', 1),
    ("1e400", '{"x": 1e400}', '{"x": 1e400}', 1),
    ("25 digits before the point", '{"x": 1234567890123456789012345.5}', '{"x": 1234567890123456789012345.5}', 1),
    ("1.10 is 1.1", '{"x": 1.10}', '{"x": 1.1}', 1),
    ("0.1 is no 0.1000000000000000055", '{"x": 0.1}', '{"x": 0.1000000000000000055}', 0),
):
    scored(
        f"11 {name}",
        ("json-fields", "{...}", reply, strict),
        raw=f'{{"question": "q {name}", "answer": {gold}}}',
    )

# rough: units beside a boxed number, and what is no unit
scored(
    "26 units",
    ("boxed", "9500", r"\boxed{9500 dollars}", 1), ("boxed", "18", r"\boxed{€18}", 1), ("boxed", "18", r"\boxed{18°}", 1),
    ("boxed", "18", r"\boxed{\text{18 dollars}}", 1), ("boxed", "18", r"\boxed{£18}", 1), ("boxed", "18", r"\boxed{18€}", 1),
    ("boxed", "18", r"\boxed{18 cm}", 1), ("boxed", "18", r"\boxed{\$18}", 1), ("boxed", "18", r"\boxed{18\%}", 1),
    ("boxed", "18", r"\boxed{18\text{ cm}^2}", 1), ("boxed", "18", r"\boxed{¥18}", 1), ("boxed", "18", r"\boxed{18 \text{ km/h}}", 1),
    ("boxed", "-18", r"\boxed{-€18}", 1), ("boxed", "1200", r"\boxed{1,200 apples}", 1), ("boxed", "18", r"\boxed{18 million}", 0),
    ("boxed", "18", r"\boxed{18 dozen}", 0), ("boxed", "9500", r"\boxed{9500 or 9600}", 0), ("boxed", "18", r"\boxed{18 + y}", 0),
    ("boxed", "18", r"\boxed{18x}", 0), ("boxed", "18", r"\boxed{18 thousand}", 0), ("boxed", "18", r"\boxed{\text{18 hundred}}", 0),
    ("boxed", "9500", r"\boxed{not 9500}", 0),
)  # fmt: skip
scored(
    "26 the final period", ("regex", "Paris", "The answer is Paris.", 1), ("regex", "42", "The answer is 42.", 1),
    ("regex", "e.g.", "The answer is e.g.", 1), ("regex", "3.5", "The answer is 3.5.", 1), ("regex", "Paris", "The answer is Paris..", 0),
    options={"pattern": "answer is (.*)"},
)  # fmt: skip

# rough: code in a fence that stands in a list
FUNCTION = "def f(x):\n    return x + 1"


def _indented(by: str, fence: str = "```python", end: str = "```") -> str:
    return "\n".join(by + line for line in [fence, *FUNCTION.split("\n"), end])


scored(
    "26 code",
    ("python-tests", "x + 1", "1. So:\n\n" + _indented("   "), 1), ("python-tests", "x + 1", "- So:\n" + _indented("  "), 1),
    ("python-tests", "x + 1", "So:\n" + _indented("\t"), 1), ("python-tests", "x + 1", _indented("", "~~~python", "~~~"), 1),
    ("python-tests", "x + 1", _indented("", "```py"), 1), ("python-tests", "x + 1", _indented("", "```Python"), 1),
    ("python-tests", "x + 1", _indented("", "````python", "````"), 1), ("python-tests", "x + 1", _indented("").replace("\n", "\r\n"), 1),
    ("python-tests", "x + 1", _indented("").replace("+ 1", "+ 2"), 0, 0), ("python-tests", "x + 1", _indented(""), 1, 1),
    more={"tests": ["assert f(1) == 2", "assert f(-1) == 0"]}, options={"unsafe_without_namespaces": True},
)  # fmt: skip
