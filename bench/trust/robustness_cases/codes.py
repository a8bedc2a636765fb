"""Adapters as codes, as people copy and type them (smaller)."""

from typing import Any

from bench.trust.robustness_cases.inputs import Trial, Words, tried


def code_of(t: Trial) -> str:
    return t.done(t.run("encode", t.world.first_run)).out.strip().split()[-1]


def codes(name: str, change: Any, *says: Words, ok: bool = True) -> None:
    @tried(f"29 codes: {name}", "decoded" if ok else "refused in one sentence")
    def _(t: Trial) -> None:
        came = t.run("decode", *change(code_of(t)))
        t.done(came) if ok else t.refused(came, *says)


def in_fours(code: str) -> str:
    head, _, rest = code.partition("-")
    rest = rest.replace("-", "")
    return f"{head} -" + " ".join(rest[i : i + 4] for i in range(0, len(rest), 4))


codes("cut in fours with blanks", lambda code: [in_fours(code)])
codes("cut in fours, each an argument", lambda code: in_fours(code).replace(" -", "-").split())
codes("lower case", lambda code: [code.lower()])
codes("line ends and blanks around", lambda code: [f"\n  {code}\r\n"])
codes("non-breaking blanks", lambda code: [in_fours(code).replace(" -", "-").replace(" ", "\u00a0")])
codes("a letter is wrong", lambda code: [code[:-1] + ("A" if code[-1] != "A" else "B")], ok=False)
codes("cut off", lambda code: [code[: len(code) // 2]], ok=False)
codes("empty behind the mark", lambda code: ["TINY-"], ok=False)
