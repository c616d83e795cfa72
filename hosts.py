"""More than one host: the same script runs once on each, joined by JAX's own distributed runtime.

    python train_sft.py --coordinator 10.0.0.1:8476 --n-processes 2 --process-id 0    # on one
    python train_sft.py --coordinator 10.0.0.1:8476 --n-processes 2 --process-id 1    # on the other

Under SLURM, Open MPI, GKE and on Cloud TPU slices the flags are not needed: JAX finds its peers.

What is whose, everywhere in this repository:

1. Every process holds the same host arrays (batches, samples, advantages: functions of the seed and
   of what was exchanged) and puts on its own devices only their shards of them.
2. The mesh of an update spans all devices. Rollouts and a judge run on each process's own devices,
   for its share of the prompts: no collective is in a decode loop, and a group stays together.
3. Process 0 alone touches the run folder and reads the clock; the others are told.

What a process says to the others goes through the coordinator (`everyone`), so that no device waits
for it; megabytes go over the devices' network (`gather`). All processes must call these in the same
order, from the main thread. When a process dies, JAX ends the others: those in a broken collective
at once, the rest after HEARTBEAT_S.
"""

import atexit
import ctypes
import dataclasses
import hashlib
import os
import pickle
import platform
import re
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

FLAGS = ("coordinator", "n_processes", "process_id")  # the fields that may differ between hosts
HEARTBEAT_S = 20  # a process that was silent for so long is dead to the others
BROKEN = "Gloo|UNAVAILABLE"  # what JAX's errors say when a connection to another process breaks
FOREVER_MS = 10**9  # whoever waits for a dead process is ended by HEARTBEAT_S, not by this

index, count = 0, 1  # of this process; connect() sets them
_turn = 0  # of everyone()

# ------------------------------------------------------------------------------------- connecting


def connect(config) -> None:
    """Joins the processes that a cluster or the FLAGS of a config describe; before any array.

    Neither: nothing happens. Processes of other flags, code or versions than process 0's all end
    with a line that names the difference.
    """
    global index, count
    coordinator, n, i = config.coordinator, config.n_processes, config.process_id
    asked = [value for value in (coordinator, n, i) if value is not None]
    good = len(asked) == 3 and re.fullmatch(r".+:\d+", coordinator) and 0 <= i < n
    if asked and not good:
        raise ValueError(f"--coordinator {coordinator} --n-processes {n} --process-id {i}: expected"
                         " all three: host:port, how many, and which of them from 0")
    if not jax.distributed.is_initialized():
        if not asked and not detected():
            return
        jax.config.update("jax_enable_preemption_service", False)  # runs.Run has the signals
        _say_why_at_the_end()
        try:
            jax.distributed.initialize(coordinator, n, i, heartbeat_timeout_seconds=HEARTBEAT_S)
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise SystemExit(f"the processes did not all meet at {coordinator}: {line}") from error
    index, count = jax.process_index(), jax.process_count()
    _check(config)


def detected() -> bool:
    """Whether JAX finds itself in a cluster of several processes, as initialize() would."""
    from jax._src import clusters

    for env in clusters.ClusterEnv._cluster_types:
        try:
            if not env.opt_in_only_method and env.is_env_present():
                return env.get_process_count() > 1
        except Exception as error:  # asking may fail in any way where there is none
            print(f"not a cluster by {env.__name__}: {error!r}", file=sys.stderr)
    return False


def _say_why_at_the_end() -> None:
    """Makes the last line of a process that loses another one a clear one.

    JAX ends such a process in C++ by abort(), after its own report; a Python handler would never
    run. A process that ends before the others must not wait for them as JAX would.
    """

    def lost(*_):
        line = (f"host {index} of {count}: another host ended or was lost, its own output says why;"
                " the same command on every host continues from the last checkpoint\n")
        os.write(2, line.encode())
        os._exit(1)

    _say_why_at_the_end.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lost)  # kept alive
    ctypes.CDLL(None).signal(signal.SIGABRT, _say_why_at_the_end.handler)

    def uncaught(kind, error, trace):
        if isinstance(error, jax.errors.JaxRuntimeError) and re.search(BROKEN, str(error)):
            lost()
        sys.__excepthook__(kind, error, trace)

    def leave():
        try:
            _client().wait_at_barrier("the end", 5_000)
        except jax.errors.JaxRuntimeError:  # they go on, without us
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    sys.excepthook = uncaught
    atexit.register(leave)


def _check(config) -> None:
    """Ends all processes unless they have the same flags, code and versions."""
    mine = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(config).items()
            if k not in FLAGS}
    mine |= {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    device, n = jax.local_devices()[0], jax.local_device_count()
    mine |= {"Python": platform.python_version(), "the device": f"{n} x {device.device_kind}"}
    files = [*Path(__file__).resolve().parent.glob("*.py")]
    if reward_file := getattr(config, "reward_file", None):
        files.append(Path(reward_file.rpartition(":")[0]))
    mine |= {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files if f.exists()}
    first, *others = everyone(mine)
    for i, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            there, here = (side.get(name, "absent") for side in (first, other))
            if there != here:
                raise SystemExit(f"{name} is {there!r} in process 0 but {here!r} in process {i}: "
                                 "every host needs the same flags, code and versions")


# ------------------------------------------------------------------------------------- exchanging


def _client():
    """Of the coordinator; JAX has no public way to it, and Orbax and MaxText go the same one."""
    from jax._src import distributed

    return distributed.global_state.client


def everyone(value: Any) -> list:
    """The (small) value of each process, in their order."""
    global _turn
    if count == 1:
        return [value]
    _turn += 1
    client = _client()
    client.key_value_set_bytes(f"turn{_turn}/{index:06}", pickle.dumps(value))
    client.wait_at_barrier(f"turn{_turn}", FOREVER_MS)
    values = sorted(client.key_value_dir_get_bytes(f"turn{_turn}"))
    if _turn > 1:  # whoever is here has read the last turn's
        client.key_value_delete(f"turn{_turn - 1}/{index:06}")
    return [pickle.loads(value) for _, value in values]


def gather(value: Any) -> list:
    """everyone() for values of megabytes."""
    if count == 1:
        return [value]
    from jax.experimental import multihost_utils

    blob = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = everyone(len(blob))
    padded = np.zeros(1 << (max(sizes) - 1).bit_length(), np.uint8)  # few sizes are compiled
    padded[: len(blob)] = blob
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def share(items: Sequence) -> Sequence:
    """The items that this process works on: of [a b c d e] process 1 of 2 has [b d]."""
    return items[index::count]


def join(mine: list) -> list:
    """The results of all shares, in the order of the items: undoes share()."""
    parts = gather(mine)
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def told(tree):
    """Process 0's arrays, as numpy, on every process; the others give any of the same shapes."""
    from jax.experimental import multihost_utils

    def one(x):
        blob = np.zeros(x.size * x.dtype.itemsize, np.uint8)  # bytes: a sum would lose -0.0
        if index == 0:
            blob[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        blob = np.asarray(multihost_utils.broadcast_one_to_all(blob))
        return blob.view(x.dtype).reshape(x.shape)

    return jax.tree.map(one, tree)


# ---------------------------------------------------------------------------------------- placing


def put(x, sharding: Sharding) -> jax.Array:
    """jax.device_put of what every process holds; each transfers only the shards of its devices.

    (device_put itself would first send a numpy array around to compare it.)
    """
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda shard: x[shard])


def own(mesh: Mesh) -> Mesh:
    """The part of a mesh that is this process's own devices."""
    if count == 1:
        return mesh
    axes = (jax.sharding.AxisType.Auto,)
    return Mesh(np.array(mesh.local_devices), mesh.axis_names, axis_types=axes)


def on_own(tree, mesh: Mesh, spec: P):
    """Arrays as `spec` on a mesh of own devices: views of what is whole, else gathered by all."""
    here = NamedSharding(mesh, spec)

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_put(x, here)
        if not x.is_fully_replicated or spec != P():  # the same on each host
            devices = sorted(x.sharding.mesh.devices.flat, key=lambda d: d.process_index)
            grid = np.array(devices).reshape(count, -1)
            x = jax.device_put(x, NamedSharding(Mesh(grid, ("host", *mesh.axis_names)), spec))
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, here, shards)

    return jax.tree.map(one, tree)


def whole(tree):
    """Arrays that device_get can read: those split over several hosts are gathered, to numpy."""
    from jax.experimental import multihost_utils

    split = lambda x: not (x.is_fully_addressable or x.is_fully_replicated)
    gathered = lambda x: multihost_utils.process_allgather(x, tiled=True) if split(x) else x
    return jax.tree.map(lambda x: gathered(x) if isinstance(x, jax.Array) else x, tree)
