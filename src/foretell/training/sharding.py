"""A frozen base whose blocks are spread over processes: each keeps a share and gathers a block while it runs.

Only the base is sharded (FSDP, torch's `fully_shard`). What is trained is small, whole in every process, and saved
whole by the main one; so a checkpoint does not depend on how many processes made it.
"""

from __future__ import annotations

from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from foretell.errors import ForetellError
from foretell.model import MTPModel


def shard_base(model: MTPModel, place: PartialState) -> None:
    """Spreads the blocks over all processes and puts everything on this process's device.

    The base may still lie on the CPU, where the whole of it must fit. All processes must then run the same forwards.
    Raises ForetellError for a single process and for a quantised base.
    """
    if place.num_processes == 1:
        raise ForetellError("shard_base needs several processes; start with `accelerate launch`, or leave it out")
    if model.base.quantised != "none":
        raise ForetellError("a quantised base can't be sharded; leave out shard_base or quantise")
    model.base.keep_fingerprints()  # no process holds all weights from here on
    mesh = init_device_mesh(place.device.type, (place.num_processes,))
    for block in model.base.blocks:
        fully_shard(block, mesh=mesh)
    model.to(place.device)
