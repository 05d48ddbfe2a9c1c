"""Keys of cached blocks: a keyed 128-bit hash of a block's tokens and of everything before them."""

from __future__ import annotations

from array import array
from hashlib import blake2b

KEY_BYTES = 16


class PrefixKeys:
    """Chained keys: that of block i covers blocks `0 .. i`, so that equal keys mean equal prefixes.

    The hash is keyed (BLAKE2b, RFC 7693) with a secret of the Head: nobody outside can make two prompts collide, or
    learn from a key what was asked. A salt sets a tenant's prompts apart from everybody else's.
    """

    def __init__(self, secret: bytes, block_size: int) -> None:
        self._secret = secret
        self._block_size = block_size

    def root(self, salt: str) -> bytes:
        """What the first block is chained to."""
        return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES, key=self._secret).digest()

    def extend(self, keys: list[bytes], root: bytes, token_ids: list[int], num_tokens: int) -> None:
        """Append to `keys` those of the full blocks among the first `num_tokens` of `token_ids` that it lacks."""
        size = self._block_size
        for index in range(len(keys), num_tokens // size):
            parent = keys[-1] if keys else root
            tokens = array("I", token_ids[index * size: (index + 1) * size]).tobytes()
            keys.append(blake2b(parent + tokens, digest_size=KEY_BYTES, key=self._secret).digest())
