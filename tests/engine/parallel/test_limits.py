"""What several ranks can't do, said before a model is loaded; and what few of them do where tests can't see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_eagle import tiny_eagle, write_head
from tiny_models import tiny_llama
from triton_testing import need_triton

need_triton()

from quire.engine.__main__ import main  # noqa: E402
from quire.engine.config import CoreConfig, Device, Dtype  # noqa: E402
from quire.engine.gpu.batch import GpuBatch  # noqa: E402
from quire.engine.gpu.eagle import load_gpu_eagle  # noqa: E402
from quire.engine.gpu.graphs import Graphs  # noqa: E402
from quire.engine.gpu.loading import choose_device  # noqa: E402
from quire.engine.models.model import ModelDtype  # noqa: E402
from quire.engine.models.registry import load_gpu_model  # noqa: E402
from quire.engine.parallel.processes import followers_of  # noqa: E402
from quire.engine.parallel.runner import put_tokens  # noqa: E402
from quire.service.checkpoint.locate import CheckpointFormat  # noqa: E402
from quire.service.errors import ConfigError, ModelError  # noqa: E402

NODES = {"tensor_parallel_size": 4, "nnodes": 2, "master_addr": "10.0.0.1"}


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size", "--tensor-parallel-size is 0: it must be at least 1"),
        ({"nnodes": 0}, "nnodes", "--nnodes is 0: it must be at least 1"),
        (NODES | {"nnodes": 3}, "nnodes", "--nnodes is 3 and --tensor-parallel-size, .* is 4: .* multiple, such as 6"),
        ({"nnodes": 2}, "nnodes", "--nnodes is 2 and --tensor-parallel-size, .* is 1: .* multiple, such as 2"),
        (NODES | {"node_rank": 2}, "node_rank", r"--node-rank is 2 and --nnodes is 2: it must lie in \[0, 1\]"),
        ({"node_rank": -1}, "node_rank", "--node-rank is -1"),
        (NODES | {"master_addr": ""}, "master_addr", "--nnodes is 2 and --master-addr is empty: give the address"),
        (NODES | {"master_port": 0}, "master_port", r"--master-port is 0: it must lie in \[1, 65535\]"),
        (NODES | {"master_port": 1 << 16}, "master_port", "--master-port is 65536"),
        ({"rendezvous_timeout_s": 0}, "rendezvous_timeout_s", "--rendezvous-timeout is 0: it must be above 0 seconds"),
        (
            {"tensor_parallel_size": 2, "device": Device.CPU, "dtype": Dtype.BFLOAT16},
            "dtype",
            "--dtype is bfloat16 and --tensor-parallel-size 2 on a CPU",
        ),
    ],
)
def test_wrong_values(given: dict[str, object], field: str, words: str) -> None:
    """Each would else be found by some rank in the middle of a start, while the others wait."""
    with pytest.raises(ConfigError, match=words) as caught:
        CoreConfig(**given)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_first_node_must_listen(capsys: pytest.CaptureFixture[str]) -> None:
    """The others need no address of their own, so the parser can't ask for one."""
    assert main(["--model", "m"]) == 2
    assert "--listen is missing: give HOST:PORT or unix:PATH" in capsys.readouterr().err


@pytest.mark.parametrize(("node", "ranks"), [(0, [(1, 1), (2, 2), (3, 3)]), (1, [(4, 0), (5, 1), (6, 2), (7, 3)])])
def test_ranks_of_a_node(node: int, ranks: list[tuple[int, int]]) -> None:
    """Two on one GPU, or a rank that nobody starts, would keep the others waiting."""
    config = CoreConfig(tensor_parallel_size=8, nnodes=2, node_rank=node, master_addr="h")
    assert [(spec.rank, spec.local_rank) for spec in followers_of(config)] == ranks


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a GPU of its own. Without GPUs it is said; nobody wants the interpreter by mistake."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--tensor-parallel-size is 2 and torch sees no GPU: lower it to 1, or set"):
        choose_device(CoreConfig(tensor_parallel_size=2))
    with monkeypatch.context() as patch:
        patch.setattr("quire.engine.gpu.loading.interpreted", lambda: False)
        with pytest.raises(ConfigError, match="set TRITON_INTERPRET=1 in the environment before Python starts"):
            choose_device(CoreConfig(tensor_parallel_size=2, device=Device.CPU))
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert choose_device(CoreConfig(**NODES), 1) == torch.device("cuda", 1)  # type: ignore[arg-type]
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="is 4, 4 of them on this host, where torch sees 2 GPUs: lower it, or spread"):
        choose_device(CoreConfig(tensor_parallel_size=4))


def test_a_head_that_ends_in_the_models_last_product(tmp_path: Path) -> None:
    """Rank 0 runs heads alone, and has a part of that product only."""
    tiny_llama(tmp_path)
    given = (tmp_path, CheckpointFormat.FOLDER, ModelDtype.FLOAT32, torch.device("cpu"), lambda *_: None)
    target = load_gpu_model(*given)
    head = write_head(tiny_eagle(target.config, "eagle"), tmp_path / "head", "safeail")
    target.whole_head = None
    with pytest.raises(ModelError, match=r"is an EAGLE-1 head, .*: name an EAGLE-3 head"):
        load_gpu_eagle(head, target)


def test_rows_of_padding_put_no_token_anywhere() -> None:
    """A captured step has more rows than it draws from; CPUs' steps have not."""
    batch = GpuBatch(3, 8, torch.device("cpu"))
    batch.token_ids[:] = torch.arange(27).view(3, 9)
    expected = batch.token_ids.clone()
    batch.columns.drawing_slots[:4] = torch.tensor([2, 0, -1, -1])
    batch.columns.positions[:4] = torch.tensor([5, 3, 4, 0])
    put_tokens(batch, torch.tensor([70, -1, 71, 72]))
    expected[2, 5], expected[0, 3] = 70, 0
    assert torch.equal(batch.token_ids, expected)


class Capturing(Graphs):
    """As if there was a GPU: its graphs only count how often they run."""

    def __init__(self, agree: bool | None) -> None:
        super().__init__(None, enabled=False, agree=None if agree is None else lambda fine: fine and agree)
        self._enabled = self.alone._enabled = True
        self.replays = 0

    def _capture(self, function: object) -> torch.cuda.CUDAGraph:
        return self  # type: ignore[return-value]

    def replay(self) -> None:
        self.replays += 1


@pytest.mark.parametrize(("agree", "replays"), [(None, 2), (True, 2), (False, 0)])
def test_a_graph_is_one_of_all_ranks_or_of_none(agree: bool | None, replays: int) -> None:
    """NCCL's collectives must be captured everywhere or nowhere: a rank without memory for a graph stops the others."""
    graphs, runs = Capturing(agree), 0

    def function() -> None:
        nonlocal runs
        runs += 1

    for _ in range(3):
        graphs.run("sum", function)
    assert (graphs.replays, runs) == (replays, 3 - replays)
    assert (graphs.alone is graphs) == (agree is None)
