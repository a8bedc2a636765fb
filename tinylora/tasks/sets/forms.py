"""Rows in the forms that other tools write, as question and answer: chat messages (TRL, OpenAI), ShareGPT, Alpaca.

A question here is one turn of the user and its answer one reply. What holds more is refused with a sentence, never cut.
"""

import json
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import shorten

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Keys of a list of turns that ends in the reply; TRL's list under `prompt` ends in the question."""
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip


def as_question(row: dict[str, Any], where: str, system: str) -> dict[str, Any]:
    """The row with `question` and, where it has one, `answer`; a row in the usual form comes back as it is.

    system: the recipe's prompt.system, the only system prompt that rows may bring.
    Raises: UserError, with file and line, for a conversation of several questions, one with another system prompt,
    pictures, and a form of which no question can be made.
    """
    if "question" in row or isinstance(row.get("prompt"), str):
        return row
    for key in ("prompt", *CONVERSATIONS):
        if isinstance(row.get(key), list):
            return _from_turns(row, key, where, system)
    if isinstance(row.get("instruction"), str) and ("output" in row or "answer" in row):
        return _from_alpaca(row, where)
    if {"chosen", "rejected"} <= set(row):
        raise UserError(
            f"{where}: these are preferences (chosen, rejected), and a reward here compares with one answer; write "
            "'question' and 'answer'"
        )
    return row


def _from_alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: 'input' must be a text, got {shorten(json.dumps(given, default=str), 60)}")
    question = f"{row['instruction']}\n\n{given}" if given and given.strip() else row["instruction"]
    rest = {key: value for key, value in row.items() if key not in ("instruction", "input")}
    if "answer" not in rest:
        rest["answer"] = rest.pop("output")
    return {"question": question, **rest}


def _from_turns(row: dict[str, Any], key: str, where: str, system: str) -> dict[str, Any]:
    turns = [_turn(turn, key, where) for turn in row[key]]
    own = turns.pop(0)[1] if turns and turns[0][0] == "system" else system
    if own.strip() != system.strip():
        raise UserError(
            f"{where}: {key!r} begins with the system prompt {shorten(own, 80)}, and the recipe's prompt.system is "
            f"{shorten(system, 80)}; write the one of the rows there, or take it out of them"
        )
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{where}: {key!r} must be one question of the user and at most one reply, got "
            f"{', '.join(roles[:6]) or 'no turn'}{', ...' if len(roles) > 6 else ''}; make one line of each question"
        )
    rest = {name: value for name, value in row.items() if name != key}
    if "answer" not in rest:
        if len(turns) == 2:
            rest["answer"] = turns[1][1]
        elif "completion" in rest:
            rest["answer"] = _completion(rest.pop("completion"), where)
    return {"question": turns[0][1], **rest}


def _completion(value: Any, where: str) -> Any:
    """TRL's `completion`: a text, or a list of one turn."""
    if not isinstance(value, list):
        return value
    turns = [_turn(turn, "completion", where) for turn in value]
    if [role for role, _ in turns] != ["assistant"]:
        raise UserError(f"{where}: 'completion' must be one reply of the assistant; put it as a text into 'answer'")
    return turns[0][1]


def _turn(turn: Any, key: str, where: str) -> tuple[str, str]:
    """Role and text of one message, in OpenAI's words (role, content) or ShareGPT's (from, value)."""
    if isinstance(turn, dict):
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        text = turn.get("content", turn.get("value"))
        if isinstance(text, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in text):
            text = "".join(part["text"] for part in text)
        if role and isinstance(text, str):
            return role, text
    raise UserError(
        f'{where}: {key!r} must be a list of messages such as {{"role": "user", "content": "..."}}, got '
        f"{shorten(json.dumps(turn, default=str), 80)}; or write 'question' and 'answer' as texts"
    )
