"""Servers in processes of their own, random checkpoints for them, and a client that asks for completions."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxgen

SPECIAL = ("<unk>", "<s>", "</s>")
SECONDS = 600.0


def random_checkpoint(directory: Path, shape: jaxgen.MistralConfig) -> Path:
    """A checkpoint of random weights; its tokenizer writes id 17 as "w17", and the first three as `SPECIAL`."""
    jaxgen.MistralForCausalLM(shape, rngs=nnx.Rngs(0)).save_pretrained(directory)
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), shape.vocab_size))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return directory


def jaxgen_serve(directory: Path, **sizes: int) -> list[str]:
    """The command that serves a checkpoint under the name "model"."""
    command = [sys.executable, "-m", "jaxgen", "serve", str(directory), "--name", "model", "--dtype", "float32"]
    for name, size in {"port": 0, **sizes}.items():
        command += [f"--{name.replace('_', '-')}", str(size)]
    return command


def transformers_serve(directory: Path, **batching: int) -> list[str]:
    """transformers' own server of a checkpoint, with continuous batching; fields of its config may be given."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(directory), "--continuous-batching"]
    for name, value in batching.items():
        command += [f"--cb-{name.replace('_', '-')}", str(value)]
    return [*command, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]


@contextlib.contextmanager
def running(command: list[str], ready: str) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server that answers at the path `ready`. Raises RuntimeError if it ends."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.NamedTemporaryFile() as said,
        subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=offline) as process,
    ):
        log = Path(said.name)
        try:
            while not (url := re.search(r"http://[\d.]+:\d+", log.read_text(encoding="utf-8"))):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {log.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.2)
            while httpx.get(f"{url[0]}{ready}").status_code != 200:
                time.sleep(0.2)
            yield url[0], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def completions(url: str, bodies: Sequence[dict[str, Any]], at_a_time: int) -> list[dict[str, Any]]:
    """The answers to requests for completions, in their order, with so many under way at a time."""
    with httpx.Client(base_url=url, timeout=SECONDS) as client, ThreadPoolExecutor(at_a_time) as clients:

        def answer(body: dict[str, Any]) -> dict[str, Any]:
            return client.post("/v1/completions", json=body).raise_for_status().json()

        return [*clients.map(answer, bodies)]
