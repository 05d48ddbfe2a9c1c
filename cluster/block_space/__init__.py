"""Who owns which KV-cache block, on the device, in host memory and on disk. Pure bookkeeping: no tensor is touched."""

from .block_pool import BlockPool, State
from .block_space import Answer, BlockSpace
from .prefix_match import Match
from .sequence_blocks import SequenceBlocks
from .windows import Need

__all__ = ["Answer", "BlockPool", "BlockSpace", "Match", "Need", "SequenceBlocks", "State"]
