"""What the sampler refuses to do."""

from __future__ import annotations

from ...protos.errors import KvartoError


class NonFiniteLogitsError(KvartoError):
    """Rows of logits that hold NaN or +inf, or nothing but -inf. Raised alike on every rank; nothing was sampled.

    `rows` are their indices in the logits that were given. The other rows may be sampled by another call.
    """

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"logits of rows {rows} hold NaN or +inf, or no finite value: the model's numerics failed")
        self.rows = rows
