"""How the agents of several machines meet at machine 0, and how they learn that one of them has left.

torch's own ways do not fit: c10d numbers the machines by address, so that rank 0, which writes the results, could be on
any of them; the static one never finds out that a machine has begun anew, and its rounds must be counted alike by all.
Here a round has a name of its own, which machine 0 gives to those who ask for it while it waits.
"""

import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from opensloth.errors import UserError
from opensloth.launch.world import World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo

LOOK_SECONDS = 0.5
ADDRESS_OF_INTERFACE = 0x8915  # linux/sockios.h, SIOCGIFADDR


class Meeting:
    """A torch.distributed.elastic RendezvousHandler by its methods; ranks follow from --node-rank.

    `left` is the machine that has left this round, once that is known.
    """

    def __init__(self, world: World, timeout: float) -> None:
        """`timeout`: seconds that machines wait for each other. Raises UserError for no HOST:PORT."""
        self.host, self.port = address_of(world.rdzv_endpoint or "")
        self.rank, self.machines, self.timeout = world.node_rank, world.nnodes, timeout
        self.left: int | None = None
        self._leaving = threading.Event()
        self._watch = threading.Thread(target=self._look, name="meeting", daemon=True)
        self._round = ""

    def next_rendezvous(self) -> "RendezvousInfo":
        """Wait for all machines. Raises TimeoutError that names those that did not come."""
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        deadline = time.monotonic() + self.timeout
        store, name = self._invite(deadline) if self.rank == 0 else self._ask(deadline)
        self._round = name
        self._watch.start()
        where = RendezvousStoreInfo(self.host, self.port)
        return RendezvousInfo(PrefixStore(name, store), self.rank, self.machines, where)

    def _connect(self, seconds: float, serve: bool = False) -> "TCPStore":
        from torch._C._distributed_c10d import TCPStore

        wait = timedelta(seconds=max(1.0, seconds))
        return TCPStore(self.host, self.port, None, serve, wait, wait_for_workers=False, multi_tenant=serve)

    def _invite(self, deadline: float) -> tuple["TCPStore", str]:
        store, name = self._connect(self.timeout, serve=True), f"round-{uuid.uuid4().hex}"
        others = range(1, self.machines)
        for machine in others:  # who came to an earlier round says again that it is here
            store.delete_key(f"here/{machine}")
        while missing := [machine for machine in others if not store.check([f"here/{machine}"])]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_named(missing)} did not come within {self.timeout:.0f} s")
            time.sleep(LOOK_SECONDS / 5)
        for machine in others:
            store.set(f"round/{store.get(f'here/{machine}').decode()}", name)
        return store, name

    def _ask(self, deadline: float) -> tuple["TCPStore", str]:
        me, store = uuid.uuid4().hex, None
        while (rest := deadline - time.monotonic()) > 0:
            try:
                store = store or self._connect(rest)
                store.set(f"here/{self.rank}", me)
                if store.check([f"round/{me}"]):
                    return store, store.get(f"round/{me}").decode()
            except RuntimeError:  # torch's DistError: machine 0 ends an earlier round, or is not there yet
                store = None
            time.sleep(LOOK_SECONDS / 5)
        raise TimeoutError(f"no answer from machine 0 within {self.timeout:.0f} s")

    def _look(self) -> None:
        """Until this machine leaves: has another one left? A thread with a connection that only it can block."""
        try:
            store = self._connect(self.timeout)
            while not self._leaving.wait(LOOK_SECONDS):
                if store.check([f"{self._round}/left"]):
                    self.left = int(store.get(f"{self._round}/left"))
                    return
            if not store.check([f"{self._round}/left"]):  # the first to leave is the one that the others lost
                store.set(f"{self._round}/left", str(self.rank))
        except RuntimeError:  # torch's DistError: the store goes with machine 0
            self.left = 0

    def who_left(self) -> int | None:
        """The machine that left, for which a moment is waited: lost connections are noticed before its word comes."""
        if self._round:
            self._watch.join(4 * LOOK_SECONDS)
        return self.left

    def leave(self) -> None:
        """Let the others know that this machine's processes have failed. Waits for at most two seconds."""
        self._leaving.set()
        if self._round:
            self._watch.join(2)

    # the rest of a rendezvous handler

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "opensloth"

    def get_run_id(self) -> str:
        return "opensloth"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody asks for it: agents that do not restart their workers meet once."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def _named(machines: list[int]) -> str:
    return f"machine{'s' if len(machines) > 1 else ''} {', '.join(map(str, machines))}"


def address_of(endpoint: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets. Raises UserError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--rdzv-endpoint {endpoint} is no HOST:PORT.", "For example: --rdzv-endpoint node0:29500")
    return host.strip("[]"), int(port)


def interface_to(endpoint: str) -> str | None:
    """The network interface by which this machine reaches `endpoint`; None where that cannot be told.

    Without it gloo takes the address of the host's own name, which on many systems is 127.0.0.1: the other machines
    would then look for this one on themselves.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address_of(endpoint))  # of a datagram socket: nothing is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, ADDRESS_OF_INTERFACE, name.encode().ljust(40, b"\0"))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                return name
    return None
