"""One program on several machines: every process calls `initialize` first, and then makes the same calls."""

import re

import jax

from jaxgen.errors import JaxgenError

_SILENCE = 30  # seconds without a sign of life, after which a process counts as dead and the others end


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a job: `jax.devices()` are then those of all, and a `device_map` may name as many.

    Call it before anything else that uses JAX. Under SLURM and Open MPI, and on TPUs, JAX finds all three arguments
    itself; elsewhere they are the host and port of process 0, how many processes there are, and which one this is,
    from 0 on. Every process then runs the same program, and has whole results; the one whose `jax.process_index()` is 0
    prints. Where a process dies, or does not come within five minutes, JAX ends the others with an error. Raises
    `JaxgenError` where JAX was used already, and for arguments that are none. Source: `jax.distributed.initialize`.
    """
    given = (coordinator_address, num_processes, process_id)
    if None in given and any(argument is not None for argument in given):
        raise JaxgenError(
            f"distributed.initialize: coordinator_address={coordinator_address!r}, num_processes={num_processes!r}, "
            f"process_id={process_id!r}: give all three, or none where SLURM or Open MPI says them"
        )
    if coordinator_address is not None and not re.fullmatch(r".+:[0-9]+", coordinator_address):
        raise JaxgenError(f"distributed.initialize: coordinator_address={coordinator_address!r} is not 'host:port'")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs; others have their own
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=_SILENCE)
    except (RuntimeError, ValueError) as error:
        raise JaxgenError(f"distributed.initialize: {error}") from error
