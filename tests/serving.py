"""`jaxgen serve` as a process, for tests that are its clients."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx2 as httpx


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[str]:
    """The address of a server of the demo in float32, at a free port, which compiles yet. SIGTERM ends it."""
    command = [sys.executable, "-m", "jaxgen", "serve", "--port", "0", "--dtype", "float32", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            [url] = re.findall(r"http://\S+", said) or [f"no address in {said!r}"]
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def wait_until_ready(url: str) -> None:
    """Return once everything is compiled."""
    while (answer := httpx.get(f"{url}/ready", timeout=60)).status_code != 200:
        assert answer.json()["status"] == "compiling"
        time.sleep(0.1)
