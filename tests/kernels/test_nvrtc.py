"""The CUDA text compiles for every card it is meant for, without a GPU; compiled code is kept and checked on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels import nvrtc
from worker_orcd.kernels.attention import DecodeLaunch, decode_source
from worker_orcd.kernels.gpu import Card
from worker_orcd.kernels.linear.linear import kernel_of, pair_kernel_of
from worker_orcd.kernels.linear.plan import FewTokens, Made, ManyTokens, plan_linear, plan_pair
from worker_orcd.kernels.ops.ops import KV_BITS, Activation, embed_source
from worker_orcd.kernels.ops.sample import SOURCE
from worker_orcd.kernels.source import Source, defined
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.tiles import TILE_K

try:
    nvrtc.nvrtc()
except CudaError as error:
    pytest.skip(f"{error.message}", allow_module_level=True)

CARDS = {
    "sm_80": Card(False, 163 * 1024),
    "sm_89": Card(False, 99 * 1024),
    "sm_90a": Card(True, 227 * 1024),
    "sm_100a": Card(False, 227 * 1024),
}
EVERY_CARD = pytest.mark.parametrize("arch", CARDS)
EVERY_VARIANT = (GgmlType.Q4_K, GgmlType.BF16)
TINY = 'extern "C" __global__ void one(int* x) { *x = 1; }'


@EVERY_CARD
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_matmuls_compile(kind: GgmlType, arch: str) -> None:
    """The variants of a layer's matrix, or one of each kernel; Hopper has two."""
    plan = plan_linear(4096, 4096, kind)
    variants = plan.variants(CARDS[arch])
    assert {type(v) for v in variants} == ({FewTokens, ManyTokens} if arch == "sm_90a" else {FewTokens})
    if kind not in EVERY_VARIANT:  # decoders are few lines; what surrounds them is the same for all
        variants = {plan.variant(num_tokens, CARDS[arch]) for num_tokens in (1, 256)[: len({*map(type, variants)})]}
    for variant in variants:
        source, name = kernel_of(kind, variant, has_half=TILE_K[kind] == 128)
        code = nvrtc.compile_cubin(source.text, source.headers, source.options, arch)
        assert code.startswith(b"\x7fELF")
        assert name.encode() in code


@pytest.mark.parametrize(
    ("num_rows", "activation"), [(32, "silu"), (64, "gelu"), (256, "gelu_tanh"), (64, "clamped")]
)
def test_a_matmul_with_an_activation_compiles(num_rows: int, activation: str) -> None:
    plan = plan_linear(28672, 4096, GgmlType.Q4_K)
    variant = plan.activated(plan.variant(num_rows, CARDS["sm_90a"]), activation)
    assert variant is not None
    assert plan.shared_bytes(variant) <= CARDS["sm_90a"].shared_bytes
    source, name = kernel_of(plan.type, variant)
    assert name.encode() in nvrtc.compile_cubin(source.text, source.headers, source.options, "sm_90a")


@pytest.mark.parametrize(
    ("activation", "ups", "arch"),
    [("silu", 2, "sm_80"), ("gelu", 0, "sm_89"), ("gelu_tanh", 3, "sm_100a"), ("clamped", 3, "sm_90a")],
)
def test_a_matmul_that_makes_its_operand_compiles(activation: Activation, ups: int, arch: str) -> None:
    plan, card = plan_linear(4096, 4096, GgmlType.Q4_K), CARDS[arch]
    variant = plan.making(plan.variant(1, card), Made(activation, 2, ups), card)
    assert variant is not None
    source, name = kernel_of(plan.type, variant, grouped=activation == "clamped")
    assert name.encode() in nvrtc.compile_cubin(source.text, source.headers, source.options, arch)


@EVERY_CARD
@pytest.mark.parametrize("num_rows", [1, 16])
def test_a_pair_compiles(num_rows: int, arch: str) -> None:
    """q and k beside v, as files of Llama 8B store them."""
    first, second = plan_linear(5120, 4096, GgmlType.Q4_K), plan_linear(1024, 4096, GgmlType.Q6_K)
    pair = plan_pair(first, second, num_rows, CARDS[arch], 132)
    assert pair is not None
    source, name = pair_kernel_of(first.type, second.type, pair.variant)
    assert name.encode() in nvrtc.compile_cubin(source.text, source.headers, source.options, arch)


OTHERS = [
    ("add_norm", defined(WIDTH=4096, CLUSTER=1, BLOCK=512, AHEAD=8, AFTER=0, BIAS=0)),
    ("add_norm", defined(WIDTH=36, CLUSTER=1, BLOCK=64, AHEAD=1, AFTER=1, BIAS=1)),
    *(("rope_store", defined(DIM=128, KV_BITS=bits, INTERLEAVED=bits % 2, AHEAD=4)) for bits in KV_BITS.values()),
    *(("activate", defined(ACTIVATION=kind, GATED=1, AHEAD=2)) for kind in ("SILU", "GELU", "GELU_TANH", "CLAMPED")),
    ("activate", defined(ACTIVATION="GELU", GATED=0, AHEAD=1)),
    ("combine", defined(EXPERTS=32, USED=4)),
    ("to_image", defined(PLAIN=1)),
    ("total", defined(PLAIN=1)),
    ("sample", ()),
]
OTHER_FILES = {"combine": "experts.cu"}


@EVERY_CARD
@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_the_other_kernels_compile(name: str, options: tuple[str, ...], arch: str) -> None:
    source = SOURCE if name == "sample" else Source("ops", OTHER_FILES.get(name, "rows.cu"), options)
    assert name.encode() in nvrtc.compile_cubin(source.text, source.headers, source.options, arch)


@EVERY_CARD
@pytest.mark.parametrize(
    ("head_dim", "launch", "ahead"),
    [
        (128, DecodeLaunch(2, 2), 4),
        (80, DecodeLaunch(4, 2), 0),
        (256, DecodeLaunch(1, 2), 8),
        (96, DecodeLaunch(4, 8, 1, is_whole=True), 3),
    ],
)
def test_attention_of_decodes_compiles(head_dim: int, launch: DecodeLaunch, ahead: int, arch: str) -> None:
    dtype = torch.float16 if ahead else torch.bfloat16
    source = decode_source(head_dim, dtype, 32, launch, ahead)
    assert b"decode" in nvrtc.compile_cubin(source.text, source.headers, source.options, arch)


@EVERY_CARD
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_embed_compiles(kind: GgmlType, arch: str) -> None:
    source = embed_source(kind, has_half=TILE_K[kind] == 128)
    assert b"embed" in nvrtc.compile_cubin(source.text, source.headers, source.options, arch)


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(nvrtc.CompileFailed, match=r"for sm_80: .*undefined_name"):
        nvrtc.compile_cubin("__global__ void f() { undefined_name(); }", {}, (), "sm_80")


def test_architectures() -> None:
    assert [nvrtc.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == list(CARDS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "worker-orcd" / "kernels"


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_cubin(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)


def test_code_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = nvrtc.cubin(TINY, {}, (), "sm_80")
    assert len(list(cache.iterdir())) == 1
    forbid_compiling(monkeypatch)
    assert nvrtc.cubin(TINY, {}, (), "sm_80") == code
    for other in ((TINY + " ", {}, (), "sm_80"), (TINY, {"a.cuh": ""}, (), "sm_80"), (TINY, {}, ("-DX",), "sm_80")):
        with pytest.raises(AssertionError, match="compiled again"):
            nvrtc.cubin(*other)
    with pytest.raises(AssertionError, match="compiled again"):
        nvrtc.cubin(TINY, {}, (), "sm_89")
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "99.9")
    with pytest.raises(AssertionError, match="compiled again"):
        nvrtc.cubin(TINY, {}, (), "sm_80")


@pytest.mark.parametrize("garbage", [b"", b"short", bytes(5000)])
def test_garbage_in_the_cache_is_replaced(garbage: bytes, cache: Path) -> None:
    code = nvrtc.cubin(TINY, {}, (), "sm_80")
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(garbage)
    assert nvrtc.cubin(TINY, {}, (), "sm_80") == code
    assert entry.read_bytes() == whole
    entry.write_bytes(whole[:-1])
    assert nvrtc.cubin(TINY, {}, (), "sm_80") == code
    assert [path.name for path in cache.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.cubin(TINY, {}, (), "sm_80").startswith(b"\x7fELF")
