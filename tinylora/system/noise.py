"""Lines that other libraries log when they are imported and that tell a user nothing: dropped, these and no others.

Where torchao or bitsandbytes are installed, transformers and PEFT import them for any model, and they complain that
kernels of GPUs are not there.
"""

import logging
import re

LINES = {
    "torchao": r"Failed to load .*",
    "torch.utils._pytree": r".* is an Enum subclass and is now natively supported by torch\.compile .*",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward .*",
}
"""Name of the logger, and what the whole message is like."""


class _Without(logging.Filter):
    """Lets every record pass but those whose message is like the pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.fullmatch(record.getMessage())


def drop() -> None:
    """Put the filters in their places; once is enough."""
    for name, pattern in LINES.items():
        logging.getLogger(name).addFilter(_Without(pattern))
