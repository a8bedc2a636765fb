"""Tasks: items split by a hash of their question, their prompt, a scorer. `docs/tasks.md` shows how to bring one."""

from tinylora.tasks.base import Item, Message, ScorerError, Split, Task
from tinylora.tasks.build import build_task
from tinylora.tasks.split import question_id, split_of
from tinylora.tasks.split_task import SplitTask

__all__ = ["Item", "Message", "ScorerError", "Split", "SplitTask", "Task", "build_task", "question_id", "split_of"]
