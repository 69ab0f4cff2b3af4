"""Two machines: network namespaces joined by a cable (a veth pair) that can be cut. Skipped where not allowed."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from opensloth.errors import UserError
from opensloth.launch.meeting import address_of, interface_to
from tiny import save_tiny_model
from training_fixtures import end, environment, wait_for, write_rows

ENDPOINT = "10.213.7.1:29511"
TIMEOUT = 10  # seconds after which the machines give each other up
JOB = ("data", "--model", "model", "--dtype", "float32", "--max-steps", 40, "--tokens-per-step", 300)
JOB += ("--pack-tokens", 160, "--save-steps", 5, "--logging-steps", 1)
ADAPTER = "adapter_model.safetensors"


def ip(*arguments):
    """`ip ...`, as root: an ordinary user needs sudo without a password."""
    sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
    return subprocess.run([*sudo, "ip", *arguments], capture_output=True, text=True, check=False)


class Machines:
    """Two namespaces; `start` runs a command in one of them, `cable` sets the link of the second up or down."""

    def __init__(self):
        self.names = [f"opensloth-{os.getpid()}-{number}" for number in (0, 1)]
        self.links = [f"os{os.getpid() % 10**7}{end}" for end in "ab"]

    def build(self):
        """What the system says against it, else nothing."""
        first, second = self.names
        cable = ("link", "add", self.links[0], "netns", first, "type", "veth", "peer", "name", self.links[1])
        steps = [("netns", "add", first), ("netns", "add", second), (*cable, "netns", second)]
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            steps += [("-n", name, "addr", "add", f"10.213.7.{number + 1}/30", "dev", link)]
            steps += [("-n", name, "link", "set", "lo", "up"), ("-n", name, "link", "set", link, "up")]
        return next((done.stderr.strip() for done in (ip(*step) for step in steps) if done.returncode), "")

    def remove(self):
        for name in self.names:
            ip("netns", "del", name)

    def start(self, number, directory, *arguments):
        """`os-sft ...` on a machine, as this user."""
        values = [f"{name}={value}" for name, value in environment().items()]
        user = ["setpriv", "--reuid", str(os.getuid()), "--regid", str(os.getgid()), "--clear-groups"]
        as_user = [] if os.getuid() == 0 else [*user, "env", *values]
        sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
        command = [*sudo, "ip", "netns", "exec", self.names[number], *as_user, sys.executable]
        command += ["-m", "opensloth.cli.sft", *map(str, arguments), "--node-rank", str(number)]
        return subprocess.Popen(
            command, cwd=directory, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def both(self, directory, output, *more):
        how = ("--processes", 1, "--nnodes", 2, "--rdzv-endpoint", ENDPOINT, "--timeout", TIMEOUT, "--output", output)
        return [self.start(number, directory, *JOB, *how, *more) for number in (0, 1)]

    def cable(self, state):
        done = ip("-n", self.names[1], "link", "set", self.links[1], state)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def machines():
    if not shutil.which("ip") or (os.getuid() and not (shutil.which("sudo") and shutil.which("setpriv"))):
        pytest.skip("network namespaces need the program ip, and root or sudo")
    made = Machines()
    refused = made.build()
    try:
        if refused:
            pytest.skip(f"network namespaces are not allowed here: {refused}")
        yield made
    finally:
        made.remove()


def program(name, directory, *arguments):
    command = [sys.executable, "-m", f"opensloth.cli.{name}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=directory, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def place(machines, tmp_path_factory):
    """A directory with data, and `one`: the run of a single machine with two processes."""
    directory = tmp_path_factory.mktemp("nodes")
    save_tiny_model(directory / "model")
    write_rows(directory / "rows.jsonl")
    for name, arguments in (
        ("data", ("rows.jsonl", "--model", "model", "--output", "data", "--workers", 1)),
        ("sft", (*JOB, "--processes", 2, "--output", "one")),
    ):
        code, out = end(program(name, directory, *arguments))
        assert code == 0, out
    return directory


def cut(machines, place, checkpoint, *more):
    """Start the run on both machines, or let it go on, and cut the cable once it has written that checkpoint."""
    both = machines.both(place, "two", *more)
    wait_for((place / "two" / "checkpoints" / checkpoint).is_dir, both[0], checkpoint)
    machines.cable("down")
    return both


def test_a_machine_that_is_cut_off_is_named_in_time_and_costs_no_byte(machines, place):
    """Cut for good, then the same commands with a restart, cut again and back: as if nothing had been."""
    run = place / "two"
    both = cut(machines, place, "checkpoint-5")
    begin = time.monotonic()
    outcomes = [end(process) for process in both]
    assert time.monotonic() - begin < 4 * TIMEOUT
    assert [code for code, _ in outcomes] == [3, 3], outcomes
    for number, (_, out) in enumerate(outcomes):
        assert f"machine {1 - number} " in out.lower()
        assert "goes on from the last checkpoint" in out
    machines.cable("up")
    both = cut(machines, place, "checkpoint-20", "--max-restarts", 1)
    try:
        wait_for(lambda: (run / "logs" / "rank_0.error.json").exists(), both[0], "the end of the first attempt")
    finally:
        machines.cable("up")
    outcomes = [end(process) for process in both]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert all("Restart 1 of 1" in out for _, out in outcomes)
    assert (run / ADAPTER).read_bytes() == (place / "one" / ADAPTER).read_bytes()
    assert json.loads((run / "result.json").read_text())["processes_with_these_weights"] == 2


# --- without namespaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["node0", "node0:", ":29500", "node0:http"])
def test_what_is_no_host_and_port_is_refused(endpoint):
    with pytest.raises(UserError, match="is no HOST:PORT"):
        address_of(endpoint)


def test_host_and_port_are_told_apart_also_with_an_ipv6_address():
    assert address_of("node0:29500") == ("node0", 29500)
    assert address_of("[fd00::1]:29500") == ("fd00::1", 29500)


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up on Linux alone")
def test_gloo_speaks_on_the_interface_that_leads_to_machine_0():
    assert interface_to("127.0.0.1:29500") == "lo"
    assert interface_to("no-such-host.invalid:29500") is None
