"""Which tensors a model needs, from its hyper-parameters; checked against the file before a byte of them is read."""

from __future__ import annotations

from collections.abc import Collection

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.spec import ModelSpec
from worker_orcd.quant.types import RUNNABLE

Shape = tuple[int, ...]
NAMES_SHOWN = 8


def tensor_table(spec: ModelSpec, present: Collection[str]) -> dict[str, Shape]:
    """Name → shape of every tensor the model uses, in numpy order (outermost first).

    `present` decides between the forms a file may choose: fused or split q/k/v and gate/up, tied or separate
    head, optional biases and rotation factors.
    """
    table: dict[str, Shape] = {
        "token_embd.weight": (spec.vocab_size, spec.hidden),
        "output_norm.weight": (spec.hidden,),
    }
    optional: dict[str, Shape] = {
        "output.weight": (spec.vocab_size, spec.hidden),
        "rope_freqs.weight": (spec.rope_dim // 2,),
    }
    for i in range(spec.num_layers):
        layer, layer_optional = _layer_table(spec, f"blk.{i}.", present)
        table.update({f"blk.{i}.{name}": shape for name, shape in layer.items()})
        optional.update({f"blk.{i}.{name}": shape for name, shape in layer_optional.items()})
    table.update({name: shape for name, shape in optional.items() if name in present})
    return table


def _layer_table(spec: ModelSpec, prefix: str, present: Collection[str]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Required and optional tensors of one layer, without the prefix."""
    required: dict[str, Shape] = {
        "attn_norm.weight": (spec.hidden,),
        "ffn_norm.weight": (spec.hidden,),
        "attn_output.weight": (spec.hidden, spec.q_width),
        "ffn_down.weight": (spec.hidden, spec.ffn),
    }
    optional: dict[str, Shape] = {"attn_output.bias": (spec.hidden,), "ffn_down.bias": (spec.hidden,)}
    if spec.family.qk_norm:
        required |= {"attn_q_norm.weight": (spec.head_dim,), "attn_k_norm.weight": (spec.head_dim,)}
    if f"{prefix}attn_qkv.weight" in present:
        widths = {"attn_qkv": spec.q_width + 2 * spec.kv_width}
    else:
        widths = {"attn_q": spec.q_width, "attn_k": spec.kv_width, "attn_v": spec.kv_width}
    required |= {f"{name}.weight": (width, spec.hidden) for name, width in widths.items()}
    biases = {f"{name}.bias": (width,) for name, width in widths.items()}
    (required if spec.family.qkv_bias else optional).update(biases)
    if f"{prefix}ffn_gate.weight" in present:
        widths = {"ffn_gate": spec.ffn, "ffn_up": spec.ffn}
    else:  # gate in the first half of the rows, up in the second
        widths = {"ffn_up": 2 * spec.ffn}
    required |= {f"{name}.weight": (width, spec.hidden) for name, width in widths.items()}
    optional |= {f"{name}.bias": (width,) for name, width in widths.items()}
    return required, optional


def check_tensors(gguf: GgufFile, table: dict[str, Shape]) -> None:
    """Raises ModelLoadFailed listing what is missing, unexpected, misshapen or of a type that cannot be run."""
    found = gguf.tensors
    problems = [
        _listed("missing tensors", [name for name in table if name not in found]),
        _listed("tensors this architecture does not use", [name for name in found if name not in table]),
        _listed(
            "wrong shapes",
            [
                f"{name} is {list(found[name].shape)}, needs {list(shape)}"
                for name, shape in table.items()
                if name in found and found[name].shape != shape
            ],
        ),
        _listed(
            "tensors of types that cannot be run",
            [
                f"{name} is {found[name].type.name}"
                for name in table
                if name in found and found[name].type not in RUNNABLE
            ],
        ),
    ]
    if message := "; ".join(problem for problem in problems if problem):
        raise ModelLoadFailed(f"{gguf.path.name}: {message}")


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{title}: {', '.join(names[:NAMES_SHOWN])}{more}"
