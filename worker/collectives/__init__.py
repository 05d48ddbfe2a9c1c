"""Tensors between the ranks of one worker group."""

from .communicator import Communicator, SingleRank
from .process_group import TorchCommunicator
from .rendezvous import connect, serve_store
from .shared_memory import SharedMemoryCommunicator
from .threads import ThreadCommunicator, thread_group

__all__ = ["Communicator", "SharedMemoryCommunicator", "SingleRank", "ThreadCommunicator", "TorchCommunicator",
           "connect", "serve_store", "thread_group"]
