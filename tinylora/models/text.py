"""From token ids back to text, as the model wrote it."""

from collections.abc import Sequence

from tinylora.models.base import BaseModel


def text_of(base: BaseModel, token_ids: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens; with `special`, its special tokens too.

    Many tokenizers ask for spaces before punctuation to be taken out (`a , b` becomes `a, b`), and transformers does it
    or not by its version; code and sums are not to be changed before they are scored.
    """
    return str(
        base.tokenizer.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    )
