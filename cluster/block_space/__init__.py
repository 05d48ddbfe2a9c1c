"""Who owns which KV-cache block. Pure bookkeeping: no tensor is touched here."""

from .block_pool import BlockPool
from .block_space import Answer, BlockSpace

__all__ = ["Answer", "BlockPool", "BlockSpace"]
