"""Who may change the server: the holder of the token, or, where no token is configured, this machine's own clients."""

import secrets
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request

from service.api.problems import Problem

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
HOW_TO_CONFIGURE = (
    "To allow others, start the server with EXITSERVE_ADMIN_TOKEN or --admin-token-file and send "
    "'Authorization: Bearer TOKEN'."
)


def require_authority(request: Request, token: str | None) -> None:
    """Raise 401 for a missing or wrong bearer token, 403 for a remote client where no token is configured."""
    if token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Bytes, because compare_digest refuses non-ASCII text; its time does not tell how much of the token was right.
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), token.encode()):
            return
        raise Problem(
            401,
            "token-required",
            "Token required",
            "This call needs the server's admin token: send it as 'Authorization: Bearer TOKEN'.",
            headers={"WWW-Authenticate": 'Bearer realm="exitserve"'},
        )
    # By HTTP/1.0, and without a word about it, nginx passes requests on unless it is told otherwise.
    if any(name in request.headers for name in FORWARDED) or request.scope.get("http_version") == "1.0":
        raise _forbidden("came through a proxy, and who sent it cannot be known")
    if request.client is None or not _is_loopback(request.client.host):
        raise _forbidden("comes from another machine")
    # A web page may send requests to this machine under a name of its own (DNS rebinding), never under ours. Not as
    # `request.url` has it, which takes the socket's own address for a name that it cannot read.
    addressed = request.headers.get("host")
    if addressed is not None and not _is_loopback(_hostname(addressed)):
        raise _forbidden(f"was addressed to {addressed[:200]!r}, not to this machine's loopback address")


def _hostname(addressed: str) -> str:
    """The name in a Host header; nothing where that cannot be read."""
    try:
        return urlsplit(f"//{addressed}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _forbidden(why: str) -> Problem:
    return Problem(
        403,
        "not-local",
        "Only for this machine",
        f"No admin token is configured, so only clients on this machine may do this; this request {why}. "
        + HOW_TO_CONFIGURE,
    )
