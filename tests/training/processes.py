"""Run a test's function in several real processes that are joined by gloo, as torchrun's workers are."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from characterflywheel.training.parallel import Parallel, Sharding

FORKS = multiprocessing.get_context("forkserver")  # a plain fork after a backward pass cannot do another
IMPORTS = ("characterflywheel.training.sft", "characterflywheel.training.sharding", "hypothesis", "peft",
           "transformers.models.llama.modeling_llama")  # fmt: skip
FORKS.set_forkserver_preload(list(IMPORTS))
PATIENCE_SECONDS = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together(
    function: Callable[..., Any],
    *arguments: Any,
    world: int = 2,
    local: int | None = None,
    sharding: Sharding = "none",
    device: str = "cpu",
) -> list[Any]:
    """What `function(parallel, *arguments)` returns in each of `world` processes; the first error of one is raised."""
    local, port, pipes = local or world, free_port(), []
    processes = []
    for rank in range(world):
        ours, theirs = FORKS.Pipe(duplex=False)
        places = {
            "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = FORKS.Process(target=_one, args=(theirs, places, sharding, device, function, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        answers = [pipe.recv() if pipe.poll(PATIENCE_SECONDS) else "no answer in time" for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for answer in answers:
        assert not isinstance(answer, str), answer
    return [value for (value,) in answers]


def _one(
    pipe: Connection,
    places: dict[str, Any],
    sharding: Sharding,
    device: str,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in places.items()}
    try:
        parallel = Parallel.join(sharding, device)
        value = function(parallel, *arguments)
        parallel.leave()
    except BaseException:  # the boundary of this process
        pipe.send(traceback.format_exc())
    else:
        pipe.send((value,))
