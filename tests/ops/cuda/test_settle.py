"""How the ops of a process run on its GPUs, with kernels proven, refused and absent, on the emulated device."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from emulated_cuda import NAME, emulated_cuda, unsettled
from emulation import ROOT

from smoothquant_ext import ops, reference
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.ops.cuda import machine, proof, settle
from smoothquant_ext.ops.cuda.families import families_of
from smoothquant_ext.ops.cuda.machine import Gpu
from smoothquant_ext.ops.cuda.records import COULD_NOT_RUN, RIGHT, WRONG, Record, Verdict
from smoothquant_ext.ops.declare import DECLARED
from smoothquant_ext.scheme import SCHEMES

RELEASE = "80+PTX 89 90a 100a 120"
NOWHERE = Path("/nowhere/_C_cuda.so")
X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
WEIGHT, SCALE = reference.quantize_per_token(
    torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), torch.int8
)

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


def record(**verdicts: Verdict) -> Record:
    """A proof of the emulated device in which everything is right but this."""
    every = {family: Verdict(RIGHT) for family in families_of(90, RELEASE)}
    return Record(proof.key_of(Gpu(NAME, 90)), "2026-12-01", every | verdicts, ())


@contextmanager
def proven(monkeypatch: pytest.MonkeyPatch, **verdicts: Verdict) -> Iterator[settle._State]:
    """A process that finds this proof."""
    with emulated_cuda(), unsettled() as state:
        found = record(**verdicts)
        monkeypatch.setattr(proof, "proven", lambda *_args, **_kwargs: found)
        yield state


def linear() -> torch.Tensor:
    """An INT8 layer on the device, whose bits are known."""
    arguments = (each.to("cuda") for each in (X, WEIGHT, SCALE))
    return ops.w8a8_linear(*arguments).cpu()


EXPECTED = reference.w8a8_linear(X, WEIGHT, SCALE)


def runs_python(op: str) -> bool:
    """Whether the kernel of an op on CUDA tensors is in Python."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sq::{op}", "CUDA") and op in (
        settle._state.settled.replaced if settle._state.settled else {}
    )


def test_with_proven_kernels_no_python_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with proven(monkeypatch) as state:
        assert torch.equal(linear(), EXPECTED)
        assert state.settled is not None
        assert set(state.settled.replaced) == {"attention", "linear", "w8a8_experts"} - {
            name for name, declaration in DECLARED.items() if declaration.cuda
        }
        assert torch.ops.sq._cuda_way("int8", 8) == "skinny,library,mma,wgmma,torch"
    assert caplog.messages == []


def test_without_a_library_torch_computes_and_one_sentence_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with emulated_cuda(), unsettled(library=NOWHERE) as state:
        assert torch.equal(linear(), EXPECTED)
        assert torch.equal(linear(), EXPECTED)
        assert state.settled is not None
        assert {"w8a8_linear", "rms_norm", "attention"} <= set(state.settled.replaced)
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == (
        f"8-bit ops on {NAME} are computed by torch, more slowly than by our kernels: "
        "built without CUDA kernels: no nvcc"
    )


def test_with_code_for_other_gpus_only_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SQ_EMULATED_ARCHS", "100a")
    with emulated_cuda(settled=False):
        assert torch.equal(linear(), EXPECTED)
    assert caplog.messages[0].endswith(f"{NAME} has compute capability 9.0, and the kernels are built for 100a")


def test_a_library_that_does_not_load_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(_path: Path) -> None:
        raise ImportError("smoothquant_ext cannot load _C_cuda.so: invalid ELF header")

    with proven(monkeypatch) as state:
        monkeypatch.setattr(settle.library, "load", load)
        assert torch.equal(linear(), EXPECTED)
        assert state.settled is not None
        assert set(state.settled.replaced.values()) == {"smoothquant_ext cannot load _C_cuda.so: invalid ELF header"}
    assert len(caplog.messages) == 1


def test_a_refused_producer_is_computed_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with proven(monkeypatch, quantize=Verdict(WRONG, "quantize_per_token(...)")) as state:
        assert torch.equal(linear(), EXPECTED)
        assert state.settled is not None
        assert state.settled.replaced["w8a8_linear"] == "quantize failed the proof"
        assert "rms_norm" not in state.settled.replaced
        assert "w8a8_gemm" not in state.settled.replaced
    assert caplog.messages == [
        "some CUDA kernels failed their proof here and are not used: quantize (wrong); 'smoothquant info' says more"
    ]


def test_refused_ways_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {f"{way}_int8": Verdict(COULD_NOT_RUN) for way in ("library", "skinny", "mma", "wgmma")}
    with proven(monkeypatch, **bad) as state:
        assert torch.equal(linear(), EXPECTED)
        assert torch.ops.sq._cuda_way("int8", 20) == "torch"
        assert torch.ops.sq._cuda_way("fp8", 20) != "torch"
        assert state.settled is not None
        assert "w8a8_linear" not in state.settled.replaced


def test_fast_sums_may_fail_in_silence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with proven(monkeypatch, library_fast_fp8=Verdict(WRONG)):
        linear()
    assert caplog.messages == []


def test_settling_happens_when_a_layer_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    with proven(monkeypatch) as state:
        layer = W8A8Linear(64, 32, False, SCHEMES["int8"])
        assert state.settled is None
        layer.to("cuda")
        assert state.settled is not None


def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with proven(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="the first 8-bit op on a GPU is inside a CUDA graph; run one before"):
            linear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert torch.equal(linear(), EXPECTED)


def test_threads_settle_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(), unsettled(library=NOWHERE):
        calls, results = [], []

        def slow(facts: machine.Facts) -> str:
            calls.append(1)
            threading.Event().wait(0.2)
            return "built without CUDA kernels"

        monkeypatch.setattr(machine, "why_no_kernels", slow)
        threads = [threading.Thread(target=lambda: results.append(linear())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert len(results) == 4
        assert all(torch.equal(result, EXPECTED) for result in results)


@pytest.mark.parametrize("library", [None, NOWHERE], ids=["kernels", "torch"])
def test_a_compiled_function_settles_when_it_runs(library: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(), unsettled(library):
        found = record()
        monkeypatch.setattr(proof, "proven", lambda *_args, **_kwargs: found)
        function = torch.compile(lambda x, w, s: ops.w8a8_linear(x, w, s) + 1, backend="aot_eager", fullgraph=True)
        y = function(X.to("cuda"), WEIGHT.to("cuda"), SCALE.to("cuda"))
        assert torch.equal(y.cpu(), EXPECTED + 1)
        assert settle.settled() is not None


def test_a_gpu_without_a_driver_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(), unsettled():
        monkeypatch.setattr(machine, "driver_version", lambda: 0)
        assert settle.settle().replaced["w8a8_gemm"] == "there is no NVIDIA driver"


IMPORT = """
import sys
sys.path.insert(0, {support!r})
import torch
from emulated_cuda import emulated_cuda
with emulated_cuda(settled=False):
    from smoothquant_ext.ops.cuda import proof, settle
    proof.run_child = lambda *_: sys.exit("a process was started")
    assert settle.settled() is None
"""


def test_importing_starts_nothing() -> None:
    script = IMPORT.format(support=str(ROOT / "tests" / "support"))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_forked_process_can_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another thread of the first was settling at that moment."""
    with proven(monkeypatch):
        holds, done = threading.Event(), threading.Event()

        def hold() -> None:
            with settle._state.lock:
                holds.set()
                done.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        assert holds.wait(10)
        script = multiprocessing_fork(lambda: settle.settle().replaced is not None)
        done.set()
        thread.join()
        assert script == 0


def multiprocessing_fork(check) -> int:  # type: ignore[no-untyped-def]
    """The exit status of a forked process: 0 if the check holds."""
    import multiprocessing

    def target() -> None:
        logging.disable()
        sys.exit(0 if check() else 1)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        return -1
    return process.exitcode
