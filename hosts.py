"""More than one host: the same command runs once on each, joined by JAX's distributed runtime.

    python train_sft.py --coordinator 10.0.0.1:8476 --n-processes 2 --process-id 0    # on one host
    python train_sft.py --coordinator 10.0.0.1:8476 --n-processes 2 --process-id 1    # on the other
    srun python train_sft.py --coordinator auto           # under SLURM, GKE, on Cloud TPU slices

1. Every process holds the same host arrays (batches, samples and advantages are functions of the
   seed and of what was exchanged) and puts only its own shards of them on its devices.
2. The mesh of an update spans all devices. Rollouts and a judge run on each process's own devices,
   for its share of the prompts, so there is no collective in a decode loop.
3. Process 0 alone touches the run folder and reads the clock; it tells the others.
4. When a process dies, JAX ends the others within HEARTBEAT_S; the same command continues.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

FLAGS = ("coordinator", "n_processes", "process_id")  # the fields that may differ between hosts
HEARTBEAT_S = 20  # a process that is silent for so long counts as dead
LEAVE_S = 30  # how long a process that ends waits for the others to end

index, count = 0, 1  # of this process; connect() sets both

# ------------------------------------------------------------------------------------- connecting


def connect(config) -> None:
    """Join the processes that the FLAGS of a config describe; call it before making any array.

    `--coordinator auto` is JAX's own detection. Without a flag the script is a single process.
    """
    global index, count
    address, n, i = given = config.coordinator, config.n_processes, config.process_id
    if not jax.distributed.is_initialized():
        if given == (None, None, None):
            return
        auto = given == ("auto", None, None)
        if not auto and (None in given or address == "auto" or not 0 <= i < n):
            raise ValueError("--coordinator HOST:PORT, --n-processes and --process-id (from 0) "
                             f"belong together, or --coordinator auto alone; found {given}")
        where = {} if auto else dict(
            coordinator_address=address, num_processes=n, process_id=i,
            coordinator_bind_address=address)
        jax.config.update("jax_enable_preemption_service", False)  # runs.Run handles SIGTERM
        try:
            jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_S,
                                       shutdown_timeout_seconds=LEAVE_S)
        except (RuntimeError, ValueError) as error:
            first, _, _ = str(error).partition("\n")
            raise SystemExit(f"--coordinator {address}: the processes did not meet: "
                             f"{first}") from error
    index, count = jax.process_index(), jax.process_count()
    _check(config)


def _check(config) -> None:
    """End all processes unless they have the same flags, code, versions and devices."""
    mine = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(config).items()
            if k not in FLAGS}
    mine |= {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    mine["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    mine |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
             for file in Path(__file__).resolve().parent.glob("*.py")}
    first, *others = everyone(mine)
    for i, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if (a := first.get(name)) != (b := other.get(name)):
                raise SystemExit(f"{name} is {a!r} in process 0 but {b!r} in process {i}: every "
                                 "host needs the same flags, code and versions")


# ------------------------------------------------------------------------------------- exchanging


def everyone(value: Any) -> list:
    """The JSON value of each process, in their order, on every process."""
    if count == 1:
        return [value]
    blob = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(blob)))
    length = max(1024, 1 << (int(sizes.max()) - 1).bit_length())  # few lengths, few compilations
    rows = multihost_utils.process_allgather(np.pad(blob, (0, length - len(blob))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def share(items: Sequence) -> Sequence:
    """The items that this process works on: of [a b c d e] process 1 of 2 has [b d]."""
    return items[index::count]


def join(mine: list) -> list:
    """The results of all shares, in the order of the items: the inverse of share()."""
    parts = everyone(mine)
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def broadcast(tree):
    """Process 0's arrays, as numpy, on every process; the others give any of the same shapes."""
    if count == 1:
        return tree

    def one(x):
        blob = np.zeros(x.size * x.dtype.itemsize, np.uint8)  # bytes: a float sum would lose -0.0
        if index == 0:
            blob[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        blob = np.asarray(multihost_utils.broadcast_one_to_all(blob))
        return blob.view(x.dtype).reshape(x.shape)

    # One leaf at a time, because each broadcast puts a copy on every device.
    return jax.tree.map(one, tree)


# ---------------------------------------------------------------------------------------- placing


def put(x, sharding: Sharding) -> jax.Array:
    """jax.device_put of what every process holds; each transfers only the shards of its devices."""
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would first send an array to all processes to compare it
    return jax.make_array_from_callback(x.shape, sharding, lambda shard: x[shard])


def own(mesh: Mesh) -> Mesh:
    """The part of a mesh that is this process's own devices."""
    if count == 1:  # a TPU we only compile for lists half its devices under another process
        return mesh
    return Mesh(np.array(mesh.local_devices), mesh.axis_names, axis_types=mesh.axis_types)


def on_own(tree, mesh: Mesh, spec: P):
    """Arrays laid out as `spec` on a mesh of own devices; split ones are gathered first."""
    here = NamedSharding(mesh, spec)

    def one(x):
        if getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, here)
        if not x.is_fully_replicated or spec != P():  # split as spec, the same on each host
            devices = sorted(x.sharding.mesh.devices.flat, key=lambda d: d.process_index)
            grid = np.array(devices).reshape(count, -1)
            x = jax.device_put(x, NamedSharding(Mesh(grid, ("host", *mesh.axis_names)), spec))
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, here, shards)

    return jax.tree.map(one, tree)


def whole(tree):
    """Arrays that device_get can read: those split over processes are gathered, to numpy."""

    def one(x):
        if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
