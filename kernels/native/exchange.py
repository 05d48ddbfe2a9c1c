"""Mirrors `exchange.h` for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctypes import _Pointer


class NativeExchangeConfig(ctypes.Structure):
    _fields_ = [
        ("region", c_void_p),
        ("peer_fds", c_void_p),
        ("slot_bytes", c_int64),
        ("timeout_ns", c_int64),
        ("spin_ns", c_int64),
        ("rank", c_int32),
        ("world_size", c_int32),
    ]


class NativeAllReduce(ctypes.Structure):
    _fields_ = [
        ("exchange", c_void_p),
        ("data", c_void_p),
        ("num_tokens", c_int64),
        ("dim", c_int64),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeAllGather(ctypes.Structure):
    _fields_ = [
        ("exchange", c_void_p),
        ("data", c_void_p),
        ("out", c_void_p),
        ("num_bytes", c_int64),
    ]


class NativeBroadcast(ctypes.Structure):
    _fields_ = [
        ("exchange", c_void_p),
        ("data", c_void_p),
        ("num_bytes", c_int64),
        ("source", c_int32),
    ]


class ExchangeFunctions:
    """Of the library, typed. Collectives return a status of `abi.h` and leave the rank it names in `detail`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        detail: type[_Pointer[c_int64]] = POINTER(c_int64)
        self.region_bytes = library.kvarto_exchange_bytes
        self.region_bytes.argtypes = [c_int32, c_int64]
        self.region_bytes.restype = c_int64
        self.open = library.kvarto_open_exchange
        self.open.argtypes = [POINTER(NativeExchangeConfig)]
        self.open.restype = c_void_p
        self.close = library.kvarto_close_exchange
        self.close.argtypes = [c_void_p]
        self.close.restype = None
        self.abort = library.kvarto_abort_exchange
        self.abort.argtypes = [c_void_p]
        self.abort.restype = None
        self.all_reduce = library.kvarto_all_reduce
        self.all_reduce.argtypes = [POINTER(NativeAllReduce), detail]
        self.all_gather = library.kvarto_all_gather
        self.all_gather.argtypes = [POINTER(NativeAllGather), detail]
        self.broadcast = library.kvarto_broadcast
        self.broadcast.argtypes = [POINTER(NativeBroadcast), detail]
