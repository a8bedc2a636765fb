"""Files of questions as people have them: twice the same key, other formats, other encodings (points 9 and rough)."""

import gzip
import json

from bench.trust.robustness_cases.inputs import Input, Trial, Words, put, tried

GOOD = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(24)]


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def file_is(
    name: str, content: str | bytes, *says: Words, path: str = "mine.jsonl", read: bool = False, scorer: str = "number",
    either: bool = False,
) -> None:  # fmt: skip
    """`train --dry-run` on a recipe with this file: refused with these words, or read; `either` will do, too."""

    def trial(t: Trial) -> None:
        t.write(path, content)
        t.recipe(task={"path": path, "scorer": scorer})
        came = t.run("train", "t.toml", "--dry-run")
        if read or (either and came.code == 0):
            t.done(came)
        else:
            t.refused(came, *says)

    said = " and ".join(repr(one if isinstance(one, str) else one[0]) for one in says)
    right = "it is read" if read else f"{'read, or ' if either else ''}refused: {said}"
    put(Input(name, right, trial))


ROW = '{"question": "1 + 1 =", "answer": "2"}\n'
file_is(
    "09 a key twice: answer",
    lines(GOOD[2:]) + '{"question": "1 + 1 =", "answer": "1", "answer": "2"}\n',
    "line 23",
    "answer",
)
file_is("09 a key twice: question", ROW + '{"question": "a", "question": "b", "answer": "2"}\n', "line 2", "question")
file_is(
    "09 a key twice: split", ROW + '{"question": "a", "answer": "2", "split": "train", "split": "test"}\n', "line 2"
)
file_is(
    "09 a key twice, deep in the metadata", '{"question": "a", "answer": "2", "m": {"x": 1, "x": 2}}\n', "line 1", "x"
)
file_is(
    "09 a key twice, one of them escaped", '{"question": "a", "answer": "1", "\\u0061nswer": "2"}\n', "line 1", "answer"
)
file_is(
    "09 a key twice in a gold of json-fields",
    '{"question": "a", "answer": {"x": 1, "x": 2}}\n', "line 1", "x", scorer="json-fields",
)  # fmt: skip
file_is(
    "09 a key twice in a gold of json-fields that is a text",
    '{"question": "a", "answer": "{\\"x\\": 1, \\"x\\": 2}"}\n', "x", scorer="json-fields",
)  # fmt: skip

# other formats: read, or told what to do
GZ = gzip.compress(lines(GOOD).encode(), mtime=0)
file_is("26 data: .jsonl.gz", GZ, ("gzip", "gunzip", "compressed"), path="mine.jsonl.gz", either=True)
file_is("26 data: gzip without the ending", GZ, ("gzip", "gunzip", "compressed"), either=True)
file_is("26 data: UTF-16", lines(GOOD).encode("utf-16"), "UTF-16", either=True)
file_is("26 data: UTF-16 without a mark", lines(GOOD).encode("utf-16-le"), "UTF-16", either=True)
file_is("26 data: UTF-32", lines(GOOD).encode("utf-32"), ("UTF-32", "UTF-8"), either=True)
file_is("26 data: latin-1", '{"question": "Où?", "answer": "2"}\n'.encode("latin-1"), "line 1", "UTF-8")
TRL = [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in GOOD]
file_is("26 data: TRL's list prompts", lines(TRL), "prompt", ("list", "messages", "chat"), either=True)
SYSTEM = [{**row, "prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]} for row in TRL]  # type: ignore[misc]
file_is("26 data: TRL's list prompts with a system turn", lines(SYSTEM), "prompt", ("list", "system"), either=True)
SHARE = [
    {"conversations": [{"from": "human", "value": r["question"]}, {"from": "gpt", "value": r["answer"]}]} for r in GOOD
]
file_is("26 data: ShareGPT", lines(SHARE), "conversations", ("sharegpt", "'question'"), either=True)
MESSAGES = [
    {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
    for r in GOOD
]
file_is("26 data: messages of OpenAI", lines(MESSAGES), "messages", "question", either=True)
ALPACA = [{"instruction": r["question"], "input": "", "output": r["answer"]} for r in GOOD]
file_is("26 data: Alpaca", lines(ALPACA), "instruction", ("alpaca", "'question'"), either=True)
file_is("26 data: a JSON list", json.dumps(GOOD, indent=1), ("one JSON object", "list", "array"), either=True)
file_is("26 data: one JSON list in a line", json.dumps(GOOD), ("list", "array", "JSON object"), either=True)
file_is("26 data: CSV", "question,answer\n1 + 1 =,2\n", ("table", "line 1"), "JSON", path="mine.csv", either=True)
file_is(
    "26 data: Parquet", b"PAR1\x15\x04\x15" + bytes(64) + b"PAR1", ("parquet", "UTF-8", "JSON"), path="mine.parquet"
)
file_is("26 data: a zip", b"PK\x03\x04\x14\x00" + bytes(40), ("zip", "UTF-8", "JSON"), path="mine.zip")
file_is("26 data: a number as answer", '{"question": "a", "answer": 42}\n', "line 1", "answer", either=True)
file_is("26 data: the answer is missing", ROW + '{"question": "b"}\n', "line 2", "answer")
file_is("26 data: null as answer", ROW + '{"question": "b", "answer": null}\n', "line 2", "answer")
file_is("26 data: an empty file", "", "empty")
file_is(
    "26 data: a git-lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "line 1", "JSON"
)
file_is("26 data: NaN", '{"question": "a", "answer": "2", "level": NaN}\n', "line 1", "NaN")
file_is(
    "26 data: a whole number of 5,000 digits",
    '{"question": "a", "answer": "2", "n": ' + "9" * 5000 + "}\n",
    either=True,
)
file_is("26 data: 100,000 brackets", '{"question": "a", "answer": "2", "n": ' + "[" * 100_000 + "\n", "line 1")
file_is("26 data: half a character", '{"question": "\\ud83d", "answer": "2"}\n', "line 1", ("surrogate", "half"))
file_is("26 data: cut off in the last line", lines(GOOD) + '{"question": "b", "ans', "line 25", "JSON")
file_is("26 data: one question with two answers", ROW + ROW.replace('"2"', '"3"'), "line 2", "another answer")
# and what good users write
file_is("26 data: a byte order mark and CRLF", b"\xef\xbb\xbf" + lines(GOOD).replace("\n", "\r\n").encode(), read=True)
file_is("26 data: blank lines and no last line end", "\n\n" + lines(GOOD).rstrip(), read=True)
file_is("26 data: U+2028 in a question", lines([{"question": "a\u2028b", "answer": "2"}, *GOOD]), read=True)
file_is("26 data: emoji, Arabic and NUL", lines([{"question": "😀 مرحبا \x00", "answer": "2"}, *GOOD]), read=True)


@tried("09 a key twice in gsm8k's train.jsonl", "refused with file and line")
def _(t: Trial) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(20)]
    twice = '{"question": "a", "answer": "#### 1", "answer": "#### 2"}\n'
    t.write("gsm8k/train.jsonl", lines(rows[:15]) + twice)  # type: ignore[arg-type]
    t.write("gsm8k/test.jsonl", lines(rows[15:]))  # type: ignore[arg-type]
    t.recipe(task={"name": "gsm8k", "path": "gsm8k", "scorer": "boxed"})
    t.refused(t.run("train", "t.toml", "--dry-run"), "train.jsonl", "line 16")


@tried("09 a key twice in the replies of --untrained", "refused with the file")
def _(t: Trial) -> None:
    run = t.trained()
    t.done(t.run("eval", run, "--num-items", "2", "--untrained", "u.jsonl"))
    first, *rest = (t.folder / "u.jsonl").read_text().splitlines(keepends=True)
    t.write("u.jsonl", first.replace('"strict": ', '"strict": 0.5, "strict": ', 1) + "".join(rest))
    t.refused(t.run("eval", run, "--num-items", "2", "--untrained", "u.jsonl"), "u.jsonl")


@tried("26 data: task.path with ~", "the file in the home folder is read")
def _(t: Trial) -> None:
    t.recipe(task={"path": "~/sums.jsonl"})
    t.write("home/sums.jsonl", t.world.sums())
    (t.folder / "sums.jsonl").unlink()
    t.done(t.run("train", "t.toml", "--dry-run", env={"HOME": str(t.folder / "home")}))


@tried("26 data: task.path beside the recipe, called from another folder", "the file beside the recipe is read")
def _(t: Trial) -> None:
    t.recipe("deep/t.toml")
    (t.folder / "sums.jsonl").rename(t.folder / "deep" / "sums.jsonl")
    t.done(t.run("train", "deep/t.toml", "--dry-run"))


@tried("26 data: task.path beside the recipe, and the run evaluated from a third folder", "the file is found again")
def _(t: Trial) -> None:
    t.recipe("deep/t.toml", task={"scorer": "number"})
    (t.folder / "sums.jsonl").rename(t.folder / "deep" / "sums.jsonl")
    t.done(t.run("train", "deep/t.toml"))
    t.write("third/x", "")
    t.done(t.run("eval", t.folder / "runs" / "t-001", "--num-items", "1", folder=t.folder / "third"))


@tried("26 data: a folder as task.path", "refused, with its name")
def _(t: Trial) -> None:
    t.write("mine.jsonl/x", "")
    t.recipe(task={"path": "mine.jsonl"})
    t.refused(t.run("train", "t.toml", "--dry-run"), "mine.jsonl")
