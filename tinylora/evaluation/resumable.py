"""Answers of an evaluation that is under way, so that one of hours goes on where it was stopped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from tinylora.evaluation.account import Account
from tinylora.rollouts.replies import Reply
from tinylora.system.failures import writing
from tinylora.system.files import write_atomically
from tinylora.system.jsonl import JsonlWriter, read_jsonl
from tinylora.system.outputs import Output
from tinylora.talk import Say

EVIDENCE_FILE, ITEMS_FILE, PLAN_FILE = "evidence.json", "evidence_items.jsonl", "evidence_plan.json"
TRIAL = "num_items"
"""In the details of a trial: how many items it is of."""


def check_place(folder: Path, *, force: bool) -> None:
    """That evidence can be written into a folder: over what an evaluation of ours left there, and over nothing else.

    Raises: UserError.
    """
    with writing(folder):
        is_ours = (folder / PLAN_FILE).is_file()
        for name in (EVIDENCE_FILE, ITEMS_FILE, PLAN_FILE):
            Output.at(folder / name, force=force or is_ours)
            Output.own(folder / name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition's answers, in the order of the items, and what they cost."""

    name: str
    kind: str
    label: str
    replies: tuple[Reply, ...]
    account: Account
    details: dict[str, Any]

    def plus(self, others: Iterable["Condition"]) -> Account:
        """The cost with that of others added: what had to be tried to get here."""
        accounts = [self.account, *(other.account for other in others)]
        names = ("tokens_sampled", "prompt_tokens", "seconds", "flops", "cpu_hours", "gpu_hours")
        totals: dict[str, Any] = {name: sum(getattr(one, name) or 0 for one in accounts) for name in names}
        return replace(self.account, **totals)


class Store:
    """Answers on the disk, a condition at a time, so that an evaluation of hours goes on where it was stopped.

    A plan (settings, items, vector) of another hash starts anew, and what was there is kept under names that end in
    .old. A condition is the lines with its name; what a kill left half is done again. Trials, answers to other items
    that a condition is chosen by, stand there too until it is made.
    """

    def __init__(self, path: Path, plan_path: Path, plan: dict[str, Any], say: Say, view: Path | None = None) -> None:
        """path: the lines; plan_path: the plan and what is done; view: the file made of them, where all three stay."""
        self.path, self.plan_path, self._view = path, plan_path, view
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
        self._done: dict[str, dict[str, Any]] = {}
        if self._stored_plan().get("sha256") == digest:
            self._take_up(len(plan["items"]), say)
        elif view is not None and self._stored_plan().get("done"):
            self._set_aside(say)
        self._plan = {"sha256": digest, "plan": plan}
        self._rows = [row for row in read_jsonl(self.path) if row.get("condition") in self._done] if self._done else []
        self._write_rows()
        self._write_plan()

    @classmethod
    def of_evidence(cls, folder: Path, plan: dict[str, Any], say: Say) -> Self:
        """Where `evidence.json` comes from: it stays, so that one more control leaves the others as they are."""
        return cls(folder / ITEMS_FILE, folder / PLAN_FILE, plan, say, folder / EVIDENCE_FILE)

    @classmethod
    def of_result(cls, run: Path, plan: dict[str, Any], say: Say) -> Self:
        """Where `result.json` comes from, until that is written: see `remove`."""
        return cls(run / "result_items.jsonl.part", run / "result_plan.json.part", plan, say)

    def _take_up(self, num_items: int, say: Say) -> None:
        counts = Counter(row.get("condition") for row in read_jsonl(self.path)) if self.path.exists() else Counter()
        done = self._stored_plan()["done"]
        self._done = {
            name: told for name, told in done.items() if counts[name] == told["details"].get(TRIAL, num_items)
        }
        if lost := [name for name in done if name not in self._done]:
            say(f"{self.path.name} lacks answers of {', '.join(lost)}, which are made again")
        if self._done:
            say(f"{len(self._done)} conditions are there already and are kept: {', '.join(self._done)}")

    def remove(self) -> None:
        """The answers are written elsewhere."""
        for path in (self.plan_path, self.path):
            path.unlink(missing_ok=True)

    def drop(self, *names: str) -> None:
        """Forget conditions: their names first, then their lines."""
        for name in names:
            del self._done[name]
        self._write_plan()
        self._rows = [row for row in self._rows if row["condition"] not in names]
        self._write_rows()

    def _set_aside(self, say: Say) -> None:
        """What other settings gave. The plan goes last: while it is there, a start after a kill comes here again."""
        for path in (self.path, self._view, self.plan_path):
            if path is not None and path.exists():
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
        rows = [row for row in self._rows if row["condition"] == name]
        done = self._done[name]
        return Condition(
            name=name, kind=done["kind"], label=done["label"], details=done["details"],
            replies=tuple(Reply.from_row(row) for row in rows),
            account=Account(**done["account"]),
        )  # fmt: skip

    def put(self, condition: Condition) -> None:
        """Keep a finished condition: its lines first, then its name in the plan."""
        with JsonlWriter(self.path) as lines:
            for reply in condition.replies:
                row = {"condition": condition.name, **reply.row()}
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
