"""Answers of an evaluation that is under way, so that one of hours goes on where it was stopped."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tinylora.evaluation.account import Account
from tinylora.rollouts.replies import ItemResult
from tinylora.system.files import write_atomically
from tinylora.system.jsonl import JsonlWriter, read_jsonl
from tinylora.talk import Say

_FIELDS = tuple(one.name for one in fields(ItemResult))


class Partial:
    """Finished parts of an evaluation in a JSONL file, each a list of answers under a name.

    `plan` is all that decides the answers: the file of another plan begins anew. A part that a kill left half is not
    there.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], say: Say) -> None:
        self._path = path
        self._plan = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._done: dict[str, list[ItemResult]] = {}
        rows = [row for row in read_jsonl(path) if row.get("plan") == self._plan] if path.exists() else []
        for row in rows:
            self._done.setdefault(row["part"], []).append(ItemResult(**{name: row[name] for name in _FIELDS}))
        sizes = {row["part"]: row["of"] for row in rows}
        self._done = {part: results for part, results in self._done.items() if len(results) == sizes[part]}
        if self._done:
            say(f"{path.name} has what was evaluated before: {', '.join(self._done)}")
        self._rewrite()

    def answers(self, part: str, make: Callable[[], Sequence[ItemResult]]) -> list[ItemResult]:
        """The answers that are there, or those that `make` gives, which are kept."""
        if part not in self._done:
            results = list(make())
            with JsonlWriter(self._path) as lines:
                for result in results:
                    lines.append(self._row(part, len(results), result))
            self._done[part] = results
        return self._done[part]

    def remove(self) -> None:
        """The evaluation is written elsewhere."""
        self._path.unlink(missing_ok=True)

    def _row(self, part: str, size: int, result: ItemResult) -> dict[str, Any]:
        return {"plan": self._plan, "part": part, "of": size, **asdict(result)}

    def _rewrite(self) -> None:
        rows = [self._row(part, len(results), one) for part, results in self._done.items() for one in results]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self._path, text.encode("utf-8", errors="replace"))


EVIDENCE_FILE, ITEMS_FILE, PLAN_FILE = "evidence.json", "evidence_items.jsonl", "evidence_plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition's answers, in the order of the items, and what they cost."""

    name: str
    kind: str
    label: str
    results: tuple[ItemResult, ...]
    account: Account
    details: dict[str, Any]


class Store:
    """Answers on the disk, a condition at a time, so that a run of hours goes on where it was stopped.

    A plan (settings, items, vector) of another hash starts anew, and what was there is kept under names that end in
    .old. A condition is the lines with its name; what a kill left half is done again.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], say: Say) -> None:
        self.path, self.plan_path = folder / ITEMS_FILE, folder / PLAN_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._evidence_path = folder / EVIDENCE_FILE
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
        self._done: dict[str, dict[str, Any]] = {}
        if self._stored_plan().get("sha256") == digest:
            counts = Counter(row.get("condition") for row in read_jsonl(self.path)) if self.path.exists() else Counter()
            done, size = self._stored_plan()["done"], len(plan["items"])
            self._done = {name: told for name, told in done.items() if counts[name] == size}
            if lost := [name for name in done if name not in self._done]:
                say(f"{self.path.name} lacks answers of {', '.join(lost)}, which are made again")
            if self._done:
                say(f"{len(self._done)} conditions are there already and are kept: {', '.join(self._done)}")
        elif self._stored_plan().get("done"):
            self._set_aside(say)
        self._plan = {"sha256": digest, "plan": plan}
        kept = [row for row in read_jsonl(self.path) if row.get("condition") in self._done] if self._done else []
        self._rows = kept
        self._write_rows()
        self._write_plan()

    def drop(self, name: str) -> None:
        """Forget a condition: its name first, then its lines."""
        del self._done[name]
        self._write_plan()
        self._rows = [row for row in self._rows if row["condition"] != name]
        self._write_rows()

    def _set_aside(self, say: Say) -> None:
        """What other settings gave. The plan goes last: while it is there, a start after a kill comes here again."""
        for path in (self.path, self._evidence_path, self.plan_path):
            if path.exists():
                path.replace(path.with_name(path.name + ".old"))
        say(
            f"{self.path.parent} holds answers under other settings (items, task, prompt, budget or numbers); they are "
            f"kept as {self.path.name}.old, and this begins anew"
        )

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        write_atomically(self.path, lines.encode("utf-8", errors="replace"))

    def get(self, name: str) -> Condition | None:
        """A condition that was finished before, or None."""
        if name not in self._done:
            return None
        fields = (
            "item_id",
            "question",
            "answer",
            "text",
            "strict",
            "value_only",
            "stopped",
            "num_tokens",
            "scores",
            "answered",
        )
        rows = [row for row in self._rows if row["condition"] == name]
        done = self._done[name]
        return Condition(
            name=name, kind=done["kind"], label=done["label"], details=done["details"],
            results=tuple(ItemResult(**{field: row[field] for field in fields}) for row in rows),
            account=Account(**done["account"]),
        )  # fmt: skip

    def put(self, condition: Condition) -> None:
        """Keep a finished condition: its lines first, then its name in the plan."""
        with JsonlWriter(self.path) as lines:
            for result in condition.results:
                row = {"condition": condition.name, **asdict(result)}
                lines.append(row)
                self._rows.append(row)
        account = {key: value for key, value in asdict(condition.account).items() if key != "prices"}
        self._done[condition.name] = {
            "kind": condition.kind, "label": condition.label, "details": condition.details, "account": account,
        }  # fmt: skip
        self._write_plan()

    def _stored_plan(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.plan_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) and isinstance(stored.get("done"), dict) else {}

    def _write_plan(self) -> None:
        write_atomically(self.plan_path, (json.dumps({**self._plan, "done": self._done}, indent=1) + "\n").encode())
