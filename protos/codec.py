"""msgpack on the wire: maps with field names, unknown and ill-typed fields refused by the decoder."""

from __future__ import annotations

import msgspec

from .request import FromHead, ToHead
from .step import FromRank, ToRank

encode = msgspec.msgpack.Encoder().encode
decode_to_head = msgspec.msgpack.Decoder(ToHead).decode
decode_from_head = msgspec.msgpack.Decoder(FromHead).decode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
