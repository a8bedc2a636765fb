"""Keys and values of all running sequences, in blocks of 64 tokens: no sequence's memory has to lie in one piece.

Plain bookkeeping (`BlockPool`) and the memory itself (`KVCache`) are apart. The memory is reserved whole but the
operating system hands out pages only as blocks are written, lowest first.
"""

import ctypes
import heapq
import mmap
from collections.abc import Iterable

import torch

from tinylora.models.architecture import Architecture

BLOCK = 64
"""Tokens a block; kernels.c has the same number."""
LANES = 16
"""Values are padded to whole vectors of this many."""


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK)


class BlockPool:
    """Which blocks are free. The lowest are taken first, so that memory once touched is used again."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks; the caller has looked at num_free."""
        assert count <= len(self._free), "more blocks than are free"
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, blocks: Iterable[int]) -> None:
        """Blocks that nobody reads any more."""
        for block in blocks:
            heapq.heappush(self._free, block)


def block_bytes(architecture: Architecture) -> int:
    """Memory of one block over all layers."""
    return len(architecture.layers) * _block_numel(architecture) * architecture.dtype.itemsize


def _value_dim(architecture: Architecture) -> int:
    return -(-architecture.head_dim // LANES) * LANES


def _block_numel(architecture: Architecture) -> int:
    return architecture.num_kv_heads * BLOCK * (architecture.head_dim + _value_dim(architecture))


class KVCache:
    """The memory: a block of one layer is keys (kv_heads, head_dim, 64), then values (kv_heads, 64, value_dim).

    Keys lie transposed, so that the scores of 16 tokens are one vector. `paired` is the layout of the C kernels where
    the processor has a bfloat16 dot product: keys (kv_heads, head_dim / 2, 64, 2), values (kv_heads, 32, value_dim, 2).
    """

    def __init__(self, architecture: Architecture, num_blocks: int, *, paired: bool = False) -> None:
        self.num_blocks = num_blocks
        self.paired = paired
        self.kv_heads, self.head_dim = architecture.num_kv_heads, architecture.head_dim
        self.value_dim = _value_dim(architecture)
        self.block_numel = _block_numel(architecture)
        shape = (len(architecture.layers), num_blocks, self.block_numel)
        self.memory = torch.empty(shape, dtype=architecture.dtype, device=architecture.device)
        _advise_huge_pages(self.memory)
        self.layers = list(self.memory)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in every layer."""
        self.memory[:, target] = self.memory[:, source]

    def keys(self, layer: int) -> torch.Tensor:
        """One layer's keys, (blocks, kv_heads, head_dim, 64): a view, of a paired cache a copy."""
        part = self.layers[layer][:, : self.kv_heads * self.head_dim * BLOCK]
        if self.paired:
            part = part.reshape(self.num_blocks, self.kv_heads, self.head_dim // 2, BLOCK, 2).transpose(3, 4)
        return part.reshape(self.num_blocks, self.kv_heads, self.head_dim, BLOCK)

    def values(self, layer: int) -> torch.Tensor:
        """One layer's values, (blocks, kv_heads, 64, head_dim): a view, of a paired cache a copy."""
        part = self.layers[layer][:, self.kv_heads * self.head_dim * BLOCK :]
        if self.paired:
            part = part.reshape(self.num_blocks, self.kv_heads, BLOCK // 2, self.value_dim, 2).transpose(3, 4)
        return part.reshape(self.num_blocks, self.kv_heads, BLOCK, self.value_dim)[..., : self.head_dim]


def _advise_huge_pages(memory: torch.Tensor) -> None:
    """Ask Linux for large pages: blocks are read far apart, and looking up small ones costs a third of the speed.

    Only advice: without it, or where it is refused, nothing changes but the time.
    """
    if memory.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = memory.data_ptr() + memory.nbytes - start
    if length > 0:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(start, length, mmap.MADV_HUGEPAGE)
