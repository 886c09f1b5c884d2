"""Two hosts on one machine, for a launcher to start ranks on: each with processes, a network and a name of its own.

    with two_hosts(folder) as hosts:
        environment = {"PATH": f"{hosts.bin}:..."}         # its ssh and pdsh reach vtp-a and vtp-b
        hosts.link("down")                                 # the cable between them is cut
        hosts.crash("vtp-b")                               # every process of it ends at once
        hosts.start("vtp-b")                               # and it is back

A host is a process in new network, PID, mount and UTS namespaces (unshare(1)), the first of its PID namespace: when it
ends, the kernel ends all others of the host, and its namespaces with them; nothing is named, so nothing is left behind.
A veth pair, `eth0` on both, is the cable. `ssh` gives a command the bare environment of a login: what a launcher does
not send along is not there. Needs root; `why_not()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("vtp-a", "vtp-b")
ADDRESSES = dict(zip(NAMES, ("10.77.0.1", "10.77.0.2"), strict=True))
NAMESPACES = ("--net", "--pid", "--uts", "--mount")
START_SECONDS = 10.0

# The first process of a host: it only waits, and collects what others leave.
INIT = "hostname {name} && ip link set lo up && while sleep 60; do :; done"

SSH = """#!/bin/bash
# ssh [-o OPTION]... HOST COMMAND...
while [[ $1 == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done
host=$1; shift
exec nsenter --target "$(< '{folder}'/"$host".pid)" {namespaces} -- \\
    env -i HOME='{folder}' PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin bash -c "$*"
"""

# What DeepSpeed asks of pdsh: -S gives the largest exit code, %n is the host's number in the list.
PDSH = """#!/bin/bash
# pdsh -S -f FANOUT -w HOST,HOST COMMAND...
set -o pipefail
while [[ $1 == -* ]]; do case $1 in -w) hosts=$2; shift 2;; -f) shift 2;; -S) shift;; *) exit 2;; esac; done
number=0 pids=() largest=0
for host in ${{hosts//,/ }}; do
    command=$*
    '{folder}'/bin/ssh "$host" "${{command//%n/$number}}" 2>&1 | sed -u "s/^/$host: /" &
    pids+=($!); number=$((number + 1))
done
for pid in "${{pids[@]}}"; do wait "$pid"; code=$?; ((code > largest)) && largest=$code; done
exit "$largest"
"""


def why_not() -> str | None:
    """Why there can be no hosts on this machine, or None where there can."""
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "x0", "type", "veth", "peer", "x1"],
        capture_output=True,
        text=True,
    )
    return None if probe.returncode == 0 else f"namespaces are not permitted: {probe.stderr.strip()}"


@dataclass
class Hosts:
    """The hosts that are up, by name, as the process that stands for each and the first process on it."""

    folder: Path
    holders: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        """Where `ssh` and `pdsh` are."""
        return self.folder / "bin"

    def start(self, name: str) -> None:
        """Brings a host up, with a new cable to the other one if that is up."""
        # setpriv: a test that is killed takes its hosts with it.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.holders[name] = subprocess.Popen([*command, "bash", "-c", INIT.format(name=name)], stderr=log)
        self.pids[name] = pid = self._first_process(name)
        (self.folder / f"{name}.pid").write_text(str(pid))
        if len(self.pids) == len(NAMES):
            self._connect()

    def crash(self, name: str) -> None:
        """Ends every process of a host at once, as a lost power supply does."""
        os.kill(self.pids.pop(name), signal.SIGKILL)
        self.holders.pop(name).wait()

    def link(self, state: str) -> None:
        """Cuts the cable (`down`) or mends it (`up`)."""
        self.run(NAMES[1], f"ip link set eth0 {state}")

    def run(self, name: str, command: str) -> str:
        """What a command prints on a host; CalledProcessError when it fails."""
        return subprocess.run([self.bin / "ssh", name, command], check=True, capture_output=True, text=True).stdout

    def _first_process(self, name: str) -> int:
        """The host's number of its first process here, once the host answers to its name."""
        holder, deadline = self.holders[name].pid, time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
            if children:
                asked = subprocess.run(
                    ["nsenter", "--target", children[0], "--uts", "hostname"], capture_output=True, text=True
                )
                if asked.stdout.strip() == name:
                    return int(children[0])
            time.sleep(0.01)
        raise TimeoutError(f"{name} did not come up in {START_SECONDS:g} s")

    def _connect(self) -> None:
        one, other = (str(self.pids[name]) for name in NAMES)
        pair = ["ip", "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other]
        subprocess.run(pair, check=True)
        for name, address in ADDRESSES.items():
            self.run(name, f"ip address add {address}/24 dev eth0 && ip link set eth0 up")


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """vtp-a and vtp-b, connected; `folder` keeps what reaches them, and is their home directory."""
    hosts = Hosts(folder)
    hosts.bin.mkdir(parents=True)
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        (hosts.bin / name).write_text(script.format(folder=folder, namespaces=" ".join(NAMESPACES)))
        (hosts.bin / name).chmod(0o755)
    try:
        for name in NAMES:
            hosts.start(name)
        yield hosts
    finally:
        for name in tuple(hosts.pids):
            hosts.crash(name)
        for holder in hosts.holders.values():  # of a host that did not come up
            holder.kill()
            holder.wait()
