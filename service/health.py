"""`python -m service.health`: is the server on this machine ready? For container health checks, where there is no curl.

Exit codes: 0 ready, 1 not (the reason goes to standard error). It imports nothing but the standard library, because it
is asked every few seconds.
"""

import http.client
import json
import os
import sys

TIMEOUT_S = 3.0
DEFAULT_PORT = 8000
OWN = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens on every interface is asked."""


def why_not_ready(port: int, host: str = "127.0.0.1") -> str | None:
    """Ask `/readyz`; returns None where the server is ready, else why it is not."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        if response.status == 200:
            return None
        problem = json.loads(response.read(65536))
        return str(problem["detail"])
    except (OSError, http.client.HTTPException) as error:
        return f"port {port} on {host} does not answer ({error})"
    except (ValueError, KeyError, TypeError):
        return f"port {port} on {host} answers, but not as ExitServe does"
    finally:
        connection.close()


def main() -> int:
    port = os.environ.get("EXITSERVE_PORT") or str(DEFAULT_PORT)
    reason = f"EXITSERVE_PORT is {port!r}, not a port"
    if port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        host = os.environ.get("EXITSERVE_HOST", "")
        reason = why_not_ready(int(port), OWN.get(host, host)) or ""
    if reason:
        sys.stderr.write(f"not ready: {reason}\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
