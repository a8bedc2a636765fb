# ruff: noqa: E501 (tables of inputs, a line each)
"""Gold answers that no reply can match, or that mean something else than they say (points 16, 17 and rough)."""

from bench.trust.robustness_cases.inputs import Trial, scored, tried

NOT_MATHEMATICS = (
    "１２", "12:00", "1/0", "1 000", "2023-05-01", "listen", "silent", "10 000 000", "1.2.3", "London", "London Bridge", "12:30 pm",
    "192.168.0.1", "0/0", "٣", "九", "hello world", "---", "01/02/2023", "3 o'clock",
)  # fmt: skip
MATHEMATICS = (
    ("1/2", r"\boxed{0.5}"), (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), ("x^2+1", r"\boxed{1+x^2}"), ("(1,2)", r"\boxed{(1, 2)}"),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}}"), (r"\pi", r"\boxed{\pi}"), ("-5", r"\boxed{-5}"), ("12", r"\boxed{12.0}"), ("x", r"\boxed{x}"),
    (r"50\%", r"\boxed{50\%}"), (r"\frac{x+1}{2}", r"\boxed{\frac{x+1}{2}}"), ("[0,1)", r"\boxed{[0,1)}"), ("3.14", r"\boxed{3.14}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"), (r"\text{(A)}", r"\boxed{\text{(A)}}"), ("1,200", r"\boxed{1200}"),
    (r"\{1,2\}", r"\boxed{\{1,2\}}"), (r"10\sqrt{3}", r"\boxed{10\sqrt{3}}"), (r"90^\circ", r"\boxed{90^\circ}"), ("x=5", r"\boxed{x=5}"),
)  # fmt: skip

scored("17", *[("math-verify", gold, r"\boxed{1}", None) for gold in NOT_MATHEMATICS])
scored("17", *[("math-verify", gold, reply, 1) for gold, reply in MATHEMATICS])
scored("17", ("math-verify", "12", r"\boxed{1 2}", 0), ("math-verify", "-5", r"\boxed{5}", 0))
scored(
    "26 a gold that nobody sees",
    ("exact", "\u200b", "x", None), ("contains", "\u200b", "x", None), ("exact", "\ufeff", "x", None), ("boxed", "\u2060", "x", None),
    ("exact", " \u200d\u00ad ", "x", None), ("regex", "\u200b", "x", None), ("exact", "\u200e", "x", None),
    options={},
)  # fmt: skip


@tried("16 math-verify: one gold of 40 is '１２'", "train refuses it before step 1, with file and line or the answer")
def _(t: Trial) -> None:
    rows = [f'{{"question": "{n} + 1 =", "answer": "{n + 1}"}}' for n in range(39)]
    t.recipe(task={"path": "golds.jsonl", "scorer": "math-verify"})
    t.write("golds.jsonl", "\n".join([*rows, '{"question": "6 + 6 =", "answer": "１２"}', ""]))
    came = t.refused(t.run("train", "t.toml"), "１２")
    t.silent(came, "| reward")


@tried("16 json-fields: a gold without the field, in the last of 40 rows", "train refuses it before step 1")
def _(t: Trial) -> None:
    rows = [f'{{"question": "{n} + 1 =", "answer": {{"sum": {n + 1}}}}}' for n in range(39)]
    t.recipe(task={"path": "golds.jsonl", "scorer": "json-fields", "scorer_options": {"fields": ["sum"]}})
    t.write("golds.jsonl", "\n".join([*rows, '{"question": "6 + 6 =", "answer": {"total": 12}}', ""]))
    t.silent(t.refused(t.run("train", "t.toml"), "sum"), "| reward")


@tried("16 number: one gold of the test split is no number", "train refuses it before step 1")
def _(t: Trial) -> None:
    rows = [f'{{"question": "{n} + 1 =", "answer": "{n + 1}", "split": "train"}}' for n in range(20)]
    bad = '{"question": "6 + 66 =", "answer": "twelve", "split": "test"}'
    t.recipe(task={"path": "golds.jsonl", "scorer": "number"}, eval={"num_test": 1})
    t.write("golds.jsonl", "\n".join([*rows, bad, ""]))
    t.silent(t.refused(t.run("train", "t.toml"), "twelve"), "| reward")
