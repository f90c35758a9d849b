"""Several processes with one model: the tokens of one, whole in each; and what is left when one dies."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen.errors import JaxgenError

PROGRAM = """
import os, sys, numpy as np, jaxgen
port, count, index, dies, told = map(int, sys.argv[1:])
jaxgen.distributed.initialize(*((f"127.0.0.1:{port}", count, index) if told else ()))
sizes = {"model": 2, "data": count // 2}
model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32", device_map=sizes)
ids = np.array([[1, 5, 9, 7], [1, 8, 4, 7]])
print("tokens", model.generate(ids, max_new_tokens=6).tolist(), flush=True)
if dies and index == 1:
    os._exit(9)
for _ in range(50 * dies):
    model.generate(ids, max_new_tokens=100)
"""


def slurm(count: int, index: int) -> dict[str, str]:
    """What `srun` tells a process, as https://slurm.schedmd.com/srun.html names it."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
    return {**job, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


def open_mpi(count: int, index: int) -> dict[str, str]:
    """What `mpirun` of Open MPI 4 tells a process."""
    job = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": str(count)}
    return {**job, "OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}


Launcher = Callable[[int, int], dict[str, str]]


def run(count: int, dies: bool, launcher: Launcher | None = None) -> list[tuple[int, str, str]]:
    """The exit code and output of each process; a launcher tells them of each other, or else the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": ":".join(sys.path)}
    environment |= {"JAX_COORDINATOR_PORT": str(port)}  # a free one, where a launcher's would follow from the job
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (port, count, index, int(dies), int(launcher is None)))],
            env=environment | (launcher(count, index) if launcher else {}),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


def test_what_is_no_job_is_said():
    with pytest.raises(JaxgenError, match=r"num_processes=2, process_id=None: give all three, or none"):
        jaxgen.distributed.initialize("127.0.0.1:1", 2)
    with pytest.raises(JaxgenError, match=r"coordinator_address='10\.0\.0\.1' is not 'host:port'"):
        jaxgen.distributed.initialize("10.0.0.1", 2, 0)
    jax.devices()  # JAX is in use
    with pytest.raises(JaxgenError, match="must be called before any JAX"):
        jaxgen.distributed.initialize("127.0.0.1:1", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "launcher"), [(4, None), (2, slurm), (2, open_mpi)])
def test_each_process_has_the_whole_result(count: int, launcher: Launcher | None):
    model: Any = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32", device_map="cpu")
    wanted = model.generate(np.array([[1, 5, 9, 7], [1, 8, 4, 7]]), max_new_tokens=6).tolist()
    for code, out, err in run(count, dies=False, launcher=launcher):
        assert code == 0, err[-2000:]
        assert f"tokens {wanted}" in out


@pytest.mark.slow
def test_the_others_end_where_one_dies():
    ended = run(4, dies=True)
    assert ended[1][0] == 9
    for code, out, err in ended[:1] + ended[2:]:
        assert "tokens" in out
        assert code not in (0, None)
        assert "closed by peer" in err or "heartbeat" in err or "task 1" in err, err[-2000:]
