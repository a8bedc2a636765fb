"""Which split a question belongs to: a function of its text alone, never of a seed, an index or a file's order.

Seeds do not separate splits: item i of seed s of a reasoning-gym task is item i + 1 of seed s - 1, and small tasks
repeat themselves. A hash of the question does, and it survives regenerating, shuffling and extending the data.
"""

import hashlib
import unicodedata

from tinylora.errors import UserError
from tinylora.tasks.base import Split


def question_id(text: str) -> str:
    """SHA-256 (hex) of the normalised question: Unicode NFC, then white space stripped at both ends, as UTF-8.

    Lone surrogates, which UTF-8 forbids, are hashed as they stand, so that every string has an id.
    """
    normal = unicodedata.normalize("NFC", text).strip()
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()


def split_of(question: str, validation_share: float, test_share: float) -> Split:
    """The split of a question: the first 64 bits of its id, as a number x in [0, 1), decide.

    test for x < test_share, validation for the next validation_share, train for the rest. Test comes first so that
    changing validation_share moves no question into or out of the test.
    """
    x = int(question_id(question)[:16], 16)  # compared as integers: 64 bits do not fit a float
    if x < int(test_share * 2**64):
        return "test"
    if x < int((test_share + validation_share) * 2**64):
        return "validation"
    return "train"


def check_shares(validation_share: float, test_share: float) -> None:
    """Raises: UserError unless both shares lie in [0, 1] and sum to at most 1 (NaN fails as well)."""
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 <= share <= 1:
            raise UserError(f"task.{name} must be between 0 and 1, got {share}")
    if validation_share + test_share > 1:
        raise UserError(
            f"task.validation_share and task.test_share must sum to at most 1, got {validation_share} + {test_share}"
        )
