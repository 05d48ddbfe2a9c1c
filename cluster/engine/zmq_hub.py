"""The Head's sockets: one ROUTER for all frontends, one for all ranks, both CURVE-secured (zmq_curve(7))."""

from __future__ import annotations

import logging
import random
import threading
from collections import defaultdict
from types import TracebackType

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ...protos.codec import decode_from_rank, decode_to_head, encode
from ...protos.endpoint import Endpoint
from ...protos.errors import ResourcesError
from ...protos.request import FromHead, ToHead
from ...protos.step import Lease, RankHello, Shutdown, StepPlan, StepResult
from .transport import GroupFailedError

logger = logging.getLogger(__name__)


class _OneKey:
    """Lets in whoever holds the key that this Head made and gave out through Ray."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002
        return key == self._public_key


class ZmqHub:
    """A `Transport` over sockets. `host` is the address that other nodes reach this one at."""

    def __init__(self, host: str, *, min_port: int | None = None, max_port: int | None = None) -> None:
        self._wake_lock = threading.Lock()
        self._closed = False
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        public, secret = zmq.curve_keypair()
        self._client_public, self._client_secret = zmq.curve_keypair()
        self._authenticator.configure_curve_callback(credentials_provider=_OneKey(self._client_public))
        self._server_public, self._server_secret = public, secret
        self._host = host
        self._ports = (min_port, max_port)
        try:
            self._frontends, self.frontend_endpoint = self._bind()
            self._ranks, self.rank_endpoint = self._bind()
        except BaseException:
            self.close()
            raise
        self._wake_send, self._wake_receive = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake_receive.bind("inproc://wake")
        self._wake_send.connect("inproc://wake")
        self._poller = zmq.Poller()
        for socket in (self._frontends, self._ranks, self._wake_receive):
            self._poller.register(socket, zmq.POLLIN)
        self._results: defaultdict[int, list[StepResult]] = defaultdict(list)
        self._connected: set[bytes] = set()

    def wait(self, timeout_s: float) -> None:
        self._poller.poll(int(timeout_s * 1000) + 1)
        while self._wake_receive.poll(0):
            self._wake_receive.recv()

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                self._wake_send.send(b"")

    def receive(self) -> list[tuple[bytes, ToHead]]:
        messages = []
        while self._frontends.poll(0):
            owner, *body = self._frontends.recv_multipart()
            try:
                messages.append((owner, decode_to_head(b"".join(body))))
            except Exception as error:
                # Its sender has a defect or another version: that must not end everybody's requests.
                logger.warning("dropped a message of a frontend: %s", error)
        # Also where no group asks for them: what is not read keeps every `wait` from waiting.
        self._receive_from_ranks()
        return messages

    def send(self, owner: bytes, message: FromHead) -> bool:
        return self._route(self._frontends, owner, encode(message))

    def link(self, epoch: int, identities: list[bytes]) -> ZmqWorkerGroup:
        """The link to the ranks with these socket identities, in rank order."""
        return ZmqWorkerGroup(self, epoch, identities)

    def send_to_rank(self, identity: bytes, body: bytes) -> bool:
        """False: no rank of that identity is connected."""
        return self._route(self._ranks, identity, body)

    def take_results(self, epoch: int) -> list[StepResult]:
        """What the ranks of `epoch` have sent since the last call."""
        self._receive_from_ranks()
        return self._results.pop(epoch, [])

    def are_connected(self, identities: list[bytes]) -> bool:
        """Whether all of these ranks have said hello."""
        self._receive_from_ranks()
        return self._connected.issuperset(identities)

    def forget_ranks(self, epoch: int, identities: list[bytes]) -> None:
        """Their worker group has ended: what still comes from them is dropped."""
        self._connected.difference_update(identities)
        self._results.pop(epoch, None)

    def close(self) -> None:
        with self._wake_lock:
            self._closed = True
        self._authenticator.stop()
        self._context.destroy(linger=200)

    def __enter__(self) -> ZmqHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive_from_ranks(self) -> None:
        while self._ranks.poll(0):
            identity, *body = self._ranks.recv_multipart()
            try:
                message = decode_from_rank(b"".join(body))
            except Exception as error:
                logger.warning("dropped a message of a rank: %s", error)
                continue
            if isinstance(message, RankHello):
                self._connected.add(identity)
            elif identity in self._connected:
                self._results[message.epoch].append(message)

    def _bind(self) -> tuple[zmq.Socket[bytes], Endpoint]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.curve_server = True
        socket.curve_secretkey = self._server_secret
        low, high = self._ports
        if low is None or high is None:
            port = socket.bind_to_random_port(f"tcp://{self._host}")
        else:
            port = _bind_in_range(socket, self._host, low, high)
        return socket, Endpoint(
            address=f"tcp://{self._host}:{port}", server_public_key=self._server_public.decode(),
            client_public_key=self._client_public.decode(), client_secret_key=self._client_secret.decode())

    def _route(self, socket: zmq.Socket[bytes], identity: bytes, body: bytes) -> bool:
        try:
            socket.send_multipart([identity, body], zmq.DONTWAIT)
        except (zmq.Again, zmq.ZMQError) as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True


def _bind_in_range(socket: zmq.Socket[bytes], host: str, low: int, high: int) -> int:
    # Every port is tried once: pyzmq's own draws with replacement and may miss the only free one.
    for port in random.sample(range(low, high + 1), high - low + 1):
        try:
            socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
        else:
            return port
    raise ResourcesError(f"no free port in {low}..{high} on {host}: widen min_port..max_port")


class ZmqWorkerGroup:
    """A `WorkerGroupLink` to ranks in other processes."""

    max_in_flight = 2

    def __init__(self, hub: ZmqHub, epoch: int, identities: list[bytes]) -> None:
        self._hub = hub
        self._epoch = epoch
        self._identities = identities

    def send(self, plan: StepPlan) -> None:
        self._broadcast(encode(plan))

    def receive(self) -> list[StepResult]:
        results = self._hub.take_results(self._epoch)
        for result in results:
            if result.error:
                raise GroupFailedError(f"rank {result.rank} failed in step {result.step_id}: {result.error}")
        return results

    @property
    def connected(self) -> bool:
        return self._hub.are_connected(self._identities)

    @property
    def has_result(self) -> bool:
        return False

    def renew_lease(self) -> None:
        self._broadcast(encode(Lease(epoch=self._epoch)))

    def close(self) -> None:
        for identity in self._identities:
            self._hub.send_to_rank(identity, encode(Shutdown(epoch=self._epoch)))
        self._hub.forget_ranks(self._epoch, self._identities)

    def _broadcast(self, body: bytes) -> None:
        missing = [rank for rank, identity in enumerate(self._identities) if not self._hub.send_to_rank(identity, body)]
        if missing:
            raise GroupFailedError(f"rank {missing[0]} is not connected")
