"""Who may change the server: holders of the admin token or, if none is configured, clients on this machine."""

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
    """Raise 401 for a missing or wrong bearer token or, if no token is configured, 403 for a remote client."""
    if token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # compare_digest takes the same time however much of the token is right. It refuses non-ASCII text, hence bytes.
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), token.encode()):
            return
        raise Problem(
            401,
            "token-required",
            "Token required",
            "This call needs the server's admin token: send it as 'Authorization: Bearer TOKEN'.",
            headers={"WWW-Authenticate": 'Bearer realm="exitserve"'},
        )
    # nginx, unless configured otherwise, forwards requests as HTTP/1.0 and without any of these fields.
    if any(name in request.headers for name in FORWARDED) or request.scope.get("http_version") == "1.0":
        raise _forbidden("came through a proxy, so that its sender is unknown")
    if request.client is None or not _is_loopback(request.client.host):
        raise _forbidden("comes from another machine")
    # By DNS rebinding, a web page can reach this machine under its own host name, but not under a loopback name. The
    # header is read here because `request.url` replaces an unreadable name by the socket's address.
    addressed = request.headers.get("host")
    if addressed is not None and not _is_loopback(_hostname(addressed)):
        raise _forbidden(f"was addressed to {addressed[:200]!r}, not to a loopback address")


def _hostname(addressed: str) -> str:
    """The host name in a Host header; empty if it cannot be parsed."""
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
        f"No admin token is configured, so only clients on the server's machine may do this; this request {why}. "
        + HOW_TO_CONFIGURE,
    )
