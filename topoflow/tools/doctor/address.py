"""How the nodes find each other: addresses, and the network interfaces behind them."""

import fcntl
import functools
import ipaddress
import socket
import struct
from pathlib import Path

from topoflow.launch import INTERFACES, Launch, forget_interface, set_variables
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Check, Finding
from topoflow.tools.doctor.survey import Answer, Survey, values

ITSELF = "the node itself"
_SIOCGIFADDR = 0x8915
"""From linux/sockios.h: the IPv4 address of an interface."""


def forget_missing_interfaces() -> dict[str, str]:
    """Take from this process the interface variables that name none, so that it can meet the others and say so."""
    forgotten = {
        name: value
        for name, value in set_variables(INTERFACES).items()
        if judge_interfaces(name, value, list(local_addresses()))[0] == FAIL
    }
    for name in forgotten:
        forget_interface(name)
    return forgotten


def check_addresses(survey: Survey, forgotten: dict[str, str]) -> Check:
    """Each node resolves rank 0's address to one that others can reach, and the named interfaces exist.

    forgotten: of `forget_missing_interfaces`.
    """
    launch = survey.context.launch
    answers = survey.ask_nodes(functools.partial(describe_address, launch, forgotten))
    said = values(answers)
    check = Check("addresses", findings=list(survey.failures(answers, whole_node=True)))
    alone = len(survey.ranks_of) == 1
    for rank, found in said.items():
        node = survey.node_of[rank]
        check.note(node, address=found["address"], interface=found["interface"], link_mbit_s=found["link_mbit_s"])
        check.findings += [survey.finding(verdict, rank, text, whole_node=True) for verdict, text in found["variables"]]
        if not alone and ipaddress.ip_address(found["address"]).is_loopback:
            text = (
                f"{launch.address} is {found['address']} on this node, which reaches only itself: expected an address "
                "that all nodes reach; look at /etc/hosts"
            )
            # on rank 0 itself that is usual (Debian), and harmless as long as the others know better
            check.findings.append(survey.finding(WARNING if rank == 0 else FAIL, rank, text, whole_node=True))
    check.findings += _unlike_others(survey, answers)
    interfaces = sorted({f"{found['interface']}{_speed(found['link_mbit_s'])}" for found in said.values()} - {ITSELF})
    rank_0 = f"rank 0 is at {launch.address}:{launch.port}, reached through {', '.join(interfaces) or ITSELF}"
    variables = sorted({f"{name}={value}" for name, value in set_variables(INTERFACES).items()})
    rank_0 += f"; {', '.join(variables)}" if variables else f"; {' and '.join(INTERFACES)} are not set"
    check.summary = "one process: nobody to reach" if launch.world_size == 1 else rank_0
    return check


def describe_address(launch: Launch, forgotten: dict[str, str]) -> dict:
    """Plain values: what rank 0's address is here, the interface that routes to it, and a judgement of the variables.

    Raises:
        OSError: the address cannot be resolved, or there is no route to it.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(launch.address, launch.port or 1, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise OSError(f"{launch.address}, rank 0's address, cannot be resolved here: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; chooses a route
        mine = probe.getsockname()[0]
    addresses = local_addresses()
    interface = next((name for name, address in addresses.items() if address == mine), f"an interface with {mine}")
    if ipaddress.ip_address(target[0]) == ipaddress.ip_address(mine):
        interface = ITSELF
    variables = {**set_variables(INTERFACES), **forgotten}
    judged = [judge_interfaces(name, value, list(addresses)) for name, value in variables.items()]
    return {
        "address": target[0],
        "interface": interface,
        "link_mbit_s": link_speed(interface),
        "variables": [judgement for judgement in judged if judgement[0] != OK],
    }


def local_addresses() -> dict[str, str | None]:
    """{network interface of this node: its IPv4 address, or None}."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:  # it has none
                found[name] = None
    return found


def link_speed(interface: str) -> int | None:
    """Mbit/s of a network interface, where the system knows."""
    try:
        speed = int((Path("/sys/class/net") / interface / "speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def judge_interfaces(name: str, value: str, existing: list[str]) -> tuple[str, str]:
    """(verdict, text) on NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME.

    NCCL takes beginnings of names, `=` for whole names and `^` for those not to take (NCCL's documentation of its
    environment variables); gloo takes whole names, and fails if one is missing.
    """
    if value.startswith("^"):
        return OK, ""
    words = [word for word in value.removeprefix("=").split(",") if word]
    whole = name.startswith("GLOO") or value.startswith("=")
    missing = [word for word in words if not any(_names(word, interface, whole) for interface in existing)]
    if not missing:
        return OK, ""
    text = f"{name}={value}: no interface {', '.join(missing)} here: expected one of {', '.join(existing)}"
    return (FAIL if name.startswith("GLOO") or len(missing) == len(words) else WARNING), text


def _names(word: str, interface: str, whole: bool) -> bool:
    return interface == word if whole else interface.startswith(word)


def _unlike_others(survey: Survey, answers: list[Answer]) -> list[Finding]:
    """Nodes on which rank 0's address is another than on most; on rank 0's own it may differ."""
    home = survey.node_of[0]
    others = {rank: found["address"] for rank, found in values(answers).items() if survey.node_of[rank] != home}
    usual = max(set(others.values()), key=list(others.values()).count, default=None)
    return [
        survey.finding(WARNING, rank, f"rank 0's address is {address} here, elsewhere {usual}", whole_node=True)
        for rank, address in others.items()
        if address != usual
    ]


def _speed(link_mbit_s: int | None) -> str:
    return "" if link_mbit_s is None else f" ({link_mbit_s / 1000:g} Gbit/s)"
