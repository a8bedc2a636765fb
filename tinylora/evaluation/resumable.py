"""Answers of an evaluation that is under way, so that one of hours goes on where it was stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tinylora.rollouts.answers import ItemResult
from tinylora.rollouts.runtime import Say
from tinylora.system.files import write_atomically
from tinylora.system.jsonl import JsonlWriter, read_jsonl

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
