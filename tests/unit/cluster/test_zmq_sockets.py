"""The Head's sockets: frontends, ranks and ports, on this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import msgspec
import pytest
import zmq

from kvarto.cluster.engine.loop import EngineLoop
from kvarto.cluster.engine.transport import GroupFailedError
from kvarto.cluster.engine.zmq_hub import ZmqHub
from kvarto.cluster.metrics import Metrics
from kvarto.protos.codec import decode_from_head, encode
from kvarto.protos.endpoint import connect_dealer
from kvarto.protos.errors import ResourcesError
from kvarto.protos.request import Ping, Pong
from kvarto.protos.step import RankHello, StepPlan, StepResult

HOST = "127.0.0.1"
WAIT_S = 3.0


@pytest.fixture
def hub():
    with ZmqHub(HOST) as hub:
        yield hub


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def poll(action, timeout_s=WAIT_S):
    """The first result of `action` that is not empty."""
    deadline = time.monotonic() + timeout_s
    while not (result := action()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.005)
    return result


def free_ports(count):
    """So many consecutive ports that are free now."""
    for low in range(20_000, 60_000, 7):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(low, low + count):
                    stack.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
            return low
    raise AssertionError("no free ports")


def port_of(endpoint):
    return int(endpoint.address.rsplit(":", 1)[1])


# -- the Head's side -------------------------------------------------------------------------------------------------


def test_a_message_arrives_with_the_identity_of_its_frontend(hub, context):
    connect_dealer(context, hub.frontend_endpoint, b"me").send(encode(Ping()))
    assert poll(hub.receive) == [(b"me", Ping())]


def test_an_answer_finds_its_frontend(hub, context):
    dealer = connect_dealer(context, hub.frontend_endpoint, b"me")
    dealer.send(encode(Ping()))
    poll(hub.receive)
    hub.send(b"me", Pong(epoch=3))
    assert dealer.poll(1000) and decode_from_head(dealer.recv()) == Pong(epoch=3)


def test_a_client_with_a_key_of_its_own_is_never_heard(hub, context):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stranger = msgspec.structs.replace(hub.frontend_endpoint, client_public_key=public, client_secret_key=secret)
    connect_dealer(context, stranger, b"stranger").send(encode(Ping()))
    time.sleep(0.2)
    connect_dealer(context, hub.frontend_endpoint, b"friend").send(encode(Ping()))
    assert [owner for owner, _ in poll(hub.receive)] == [b"friend"]


def test_a_client_without_keys_is_never_heard(hub, context):
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(hub.frontend_endpoint.address)
    plain.send(encode(Ping()))
    time.sleep(0.2)
    assert hub.receive() == []


def test_keys_are_not_shown():
    with ZmqHub(HOST) as hub:
        assert hub.frontend_endpoint.client_secret_key not in repr(hub.frontend_endpoint)


def test_sending_to_a_frontend_that_never_was_says_so(hub):
    assert hub.send(b"nobody", Pong(epoch=1)) is False


def test_sending_to_a_frontend_that_has_left_says_so(hub, context):
    dealer = connect_dealer(context, hub.frontend_endpoint, b"me")
    dealer.send(encode(Ping()))
    poll(hub.receive)
    dealer.close(linger=0)
    poll(lambda: not hub.send(b"me", Pong(epoch=1)))


@pytest.mark.parametrize("body", [b"", b"\xc1 not msgpack", msgspec.msgpack.encode({"type": "from the future"})])
def test_a_message_that_cannot_be_read_costs_nobody_else_theirs(hub, context, body):
    dealer = connect_dealer(context, hub.frontend_endpoint, b"me")
    dealer.send(body)
    dealer.send(encode(Ping()))
    assert poll(hub.receive) == [(b"me", Ping())]


def test_wake_ends_a_wait(hub):
    hub.wake()
    started = time.monotonic()
    hub.wait(WAIT_S)
    assert time.monotonic() - started < 1


def test_what_comes_from_ranks_that_nobody_waits_for_does_not_keep_the_loop_spinning(hub, context):
    """As after the failure of a group: its other ranks report theirs too."""
    loop = EngineLoop(hub, Metrics(), on_group_failed=lambda *_: None)
    connect_dealer(context, hub.rank_endpoint, b"1/0").send(encode(RankHello(epoch=1, rank=0)))
    loop.run_once()
    turns, end = 0, time.monotonic() + 0.3
    while time.monotonic() < end:
        loop.run_once()
        turns += 1
    assert turns < 20


# -- ranks -----------------------------------------------------------------------------------------------------------


def joined(hub, context, epoch=1, count=2):
    identities = [b"%d/%d" % (epoch, rank) for rank in range(count)]
    link = hub.link(epoch, identities)
    ranks = [connect_dealer(context, hub.rank_endpoint, identity) for identity in identities]
    for rank, dealer in enumerate(ranks):
        dealer.send(encode(RankHello(epoch=epoch, rank=rank)))
    poll(lambda: link.connected)
    return link, ranks


def test_a_link_is_connected_once_every_rank_has_said_hello(hub, context):
    link = hub.link(1, [b"1/0", b"1/1"])
    connect_dealer(context, hub.rank_endpoint, b"1/0").send(encode(RankHello(epoch=1, rank=0)))
    poll(lambda: hub.are_connected([b"1/0"]))
    assert not link.connected


def test_a_plan_reaches_every_rank(hub, context):
    link, ranks = joined(hub, context)
    link.send(StepPlan(epoch=1, step_id=5))
    assert all(rank.poll(1000) for rank in ranks)


def test_the_error_of_any_rank_fails_the_group(hub, context):
    link, ranks = joined(hub, context)
    ranks[1].send(encode(StepResult(epoch=1, step_id=5, rank=1, error="out of memory")))
    with pytest.raises(GroupFailedError, match="rank 1 failed in step 5: out of memory"):
        poll(link.receive)


def test_a_plan_for_a_rank_that_is_gone_fails_the_group(hub, context):
    link, ranks = joined(hub, context)
    ranks[1].close(linger=0)
    with pytest.raises(GroupFailedError, match="rank 1"):
        poll(lambda: link.send(StepPlan(epoch=1, step_id=5)))


def test_results_of_two_groups_are_kept_apart(hub, context):
    (first, _), (second, ranks) = joined(hub, context, epoch=1), joined(hub, context, epoch=2)
    ranks[0].send(encode(StepResult(epoch=2, step_id=9)))
    assert [result.step_id for result in poll(second.receive)] == [9]
    assert first.receive() == []


def test_what_comes_after_a_group_has_ended_is_dropped(hub, context):
    link, ranks = joined(hub, context)
    link.close()
    ranks[0].send(encode(StepResult(epoch=1, step_id=9)))
    time.sleep(0.05)
    assert hub.take_results(1) == []


# -- ports -----------------------------------------------------------------------------------------------------------


def test_sockets_keep_to_the_range_of_ports():
    low = free_ports(4)
    with ZmqHub(HOST, min_port=low, max_port=low + 3) as hub:
        assert {port_of(hub.frontend_endpoint), port_of(hub.rank_endpoint)} <= set(range(low, low + 4))


def test_the_last_port_of_the_range_is_used():
    low = free_ports(2)
    with ZmqHub(HOST, min_port=low, max_port=low + 1) as hub:
        assert {port_of(hub.frontend_endpoint), port_of(hub.rank_endpoint)} == {low, low + 1}


@pytest.fixture
def full_range():
    low = free_ports(2)
    with socket.socket() as first, socket.socket() as second:
        for offset, holder in enumerate((first, second)):
            holder.bind((HOST, low + offset))
            holder.listen()
        yield low


def test_a_range_that_is_full_is_an_error_that_names_the_keys(full_range):
    with pytest.raises(ResourcesError, match=r"min_port\.\.max_port"):
        ZmqHub(HOST, min_port=full_range, max_port=full_range + 1)


def test_a_hub_that_found_no_port_leaves_no_thread_running(full_range):
    before = set(threading.enumerate())
    with contextlib.suppress(ResourcesError):
        ZmqHub(HOST, min_port=full_range, max_port=full_range + 1)
    assert not set(threading.enumerate()) - before
