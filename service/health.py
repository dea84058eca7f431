"""`python -m service.health`: checks whether the server on this machine is ready. For containers, which lack curl.

Exit codes: 0 ready, 1 not (the reason goes to standard error). It imports only the standard library, because it is run
every few seconds.
"""

import http.client
import json
import os
import sys

TIMEOUT_S = 3.0
DEFAULT_PORT = 8000
OWN = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to connect to, where the server listens on every interface."""


def why_not_ready(port: int, host: str = "127.0.0.1") -> str | None:
    """Call `/readyz`; return None if the server is ready, otherwise the reason why not."""
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
        return f"port {port} on {host} answers, but is not ExitServe"
    finally:
        connection.close()


def main() -> int:
    port = os.environ.get("EXITSERVE_PORT") or str(DEFAULT_PORT)
    reason = f"EXITSERVE_PORT is {port!r}, which is not a port"
    if port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        host = os.environ.get("EXITSERVE_HOST", "")
        reason = why_not_ready(int(port), OWN.get(host, host)) or ""
    if reason:
        sys.stderr.write(f"not ready: {reason}\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
