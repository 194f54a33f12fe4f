"""The processes of an engine on several ranks: together they answer, and none outlives another."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_process import Engine, core_of, engine, prompt_of, request
from processes import until_ended
from served import free_port
from session_client import DEADLINE, SessionClient
from tiny_models import greedy, tiny_llama
from transformers import LlamaForCausalLM
from triton_testing import need_triton

from quire.service.request import StopConditions

need_triton()

FLAGS = ("--device", "cpu", "--tensor-parallel-size", "2", "--max-model-len", "128", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "tiny"


@pytest.fixture(scope="module", autouse=True)
def model(folder: Path) -> LlamaForCausalLM:
    return tiny_llama(folder)


def children_of(process: int) -> list[int]:
    """With their children."""
    try:
        found = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*found, *(pid for child in found for pid in children_of(child))]


async def status_of(process: asyncio.subprocess.Process) -> int:
    return await asyncio.wait_for(process.wait(), DEADLINE)


@asynccontextmanager
async def two_nodes(folder: Path, socket: Path) -> AsyncIterator[tuple[Engine, asyncio.subprocess.Process]]:
    """An engine of one rank on each of two hosts, as two commands on this one; and the second command."""
    where = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quire.engine", "--tensor-parallel-size", "2", "--node-rank", "1", *where
    )
    try:
        async with engine(folder, socket, *FLAGS, *where) as pod:
            yield pod, node
    finally:
        if node.returncode is None:
            node.kill()
        await status_of(node)


async def test_two_nodes_answer_and_end_together(folder: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The second node is told nothing but where the first is. That it ended regularly is no failure of the second's,
    which would otherwise be started again alone."""
    prompt = prompt_of(20)
    async with two_nodes(folder, tmp_path / "e") as (pod, node):
        followers = children_of(node.pid)
        async with SessionClient(pod.address) as session:
            stream = session.submit(request(prompt, 6))
            await stream.result()
        assert stream.token_ids == greedy(model, prompt, 6)
        pod.process.terminate()
        assert (await status_of(pod.process), await status_of(node)) == (0, 0)
        until_ended(followers)


async def test_a_node_that_dies(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its ranks end with it, though they are processes of their own, and so does the engine, which says where to
    look."""
    async with two_nodes(folder, tmp_path / "e") as (pod, node):
        processes = [*children_of(node.pid), *children_of(pod.process.pid)]
        node.kill()
        assert await status_of(pod.process) == 1
        until_ended(processes)
    assert "rank 1 on 127.0.0.1 is gone (its node's log says why): without it the model" in capfd.readouterr().err


@pytest.mark.parametrize("idle", [True, False])
async def test_a_follower_that_dies(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], idle: bool
) -> None:
    """Rank 0 would wait for it in the middle of a step, for ever on a GPU; idle, it would take the next request."""
    async with engine(folder, tmp_path / "e", *FLAGS) as pod, SessionClient(pod.address) as session:
        core = core_of(pod.process.pid)
        (follower,) = children_of(core)
        if not idle:
            stream = session.submit(request(prompt_of(20), stop=StopConditions(100, ignore_eos=True)))
            await stream.until_tokens(1)
        os.kill(follower, signal.SIGKILL)
        assert await status_of(pod.process) == 1
        until_ended([core, follower])
    assert "rank 1 was ended by SIGKILL: without it the model can't go on" in capfd.readouterr().err


async def test_rank_0_that_dies(folder: Path, tmp_path: Path) -> None:
    """A follower that stayed would hold its GPU's memory."""
    async with engine(folder, tmp_path / "e", *FLAGS) as pod:
        core = core_of(pod.process.pid)
        (follower,) = children_of(core)
        os.kill(core, signal.SIGKILL)
        until_ended([follower])
        assert await status_of(pod.process) == 1


async def test_a_model_that_does_not_divide(folder: Path, tmp_path: Path) -> None:
    """It is said at once and by name, as any other wrong flag."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quire.engine", "--listen", f"unix:{tmp_path}/e", "--model", str(folder), "--device",
        "cpu", "--tensor-parallel-size", "4", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 2
    assert "--tensor-parallel-size is 4, and the model has 6 heads, 2 of them for keys and values" in errors.decode()


async def test_a_node_whose_first_node_is_not_there() -> None:
    """It ends by itself, and says where it looked."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quire.engine", "--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", "1",
        "--master-addr", "127.0.0.1", "--master-port", str(port), "--rendezvous-timeout", "0.5",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 2
    assert f"rank 1 did not reach rank 0 at 127.0.0.1:{port} within 0.5 s" in errors.decode()
