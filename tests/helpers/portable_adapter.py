"""An adapter file's content with made-up numbers."""

from typing import Any

import numpy as np

from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.portable import PortableAdapter

FINGERPRINT, CHECK = bytes(range(12)), b"\xc0\x01\x02\x03"


def adapter(groups: int = 13, value_type: Any = "bfloat16", **config: Any) -> PortableAdapter:
    settings_ = AdapterConfig(**({"num_groups": groups} | config))
    values = np.random.default_rng(0).normal(size=(groups, settings_.u)).astype(np.float32)
    made = PortableAdapter(config=settings_, fingerprint=FINGERPRINT, check=CHECK, values=values)
    return made.rounded(value_type)
