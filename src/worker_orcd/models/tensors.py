"""Which tensors a model needs, from its hyper-parameters; checked against the file before a byte of them is read."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from types import MappingProxyType

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile, TensorInfo
from worker_orcd.models.experts import expert_projections
from worker_orcd.models.spec import ModelSpec
from worker_orcd.quant.types import RUNNABLE

Shape = tuple[int, ...]
NAMES_SHOWN = 8
EXPERT_NAME = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(0|[1-9]\d{0,5})\.(weight|bias)")
CHECKPOINT_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def tensor_table(spec: ModelSpec, present: Collection[str]) -> dict[str, Shape]:
    """Name → shape of every tensor the model uses, in numpy order (outermost first).

    `present` decides between the forms a file may choose: fused or split q/k/v and gate/up, tied or separate
    head, optional biases and rotation factors.
    """
    is_gpt = spec.family.adapter == "gpt"
    table: dict[str, Shape] = {"token_embd.weight": (spec.vocab_size, spec.hidden)}
    optional: dict[str, Shape] = {"output.weight": (spec.vocab_size, spec.hidden)}
    if is_gpt:
        table["position_embd.weight"] = (spec.context_length, spec.hidden)
    table |= _norm("output_norm", spec.hidden, is_gpt)
    factors = {f"rope_factors_{name}.weight": (spec.rope.dim // 2,) for name in ("long", "short")}
    if spec.rope.scaling == "longrope":
        table |= factors
    elif spec.rope.dim:
        optional["rope_freqs.weight"] = (spec.rope.dim // 2,)
    for i in range(spec.num_layers):
        layer, layer_optional = _layer_table(spec, f"blk.{i}.", present)
        table.update({f"blk.{i}.{name}": shape for name, shape in layer.items()})
        optional.update({f"blk.{i}.{name}": shape for name, shape in layer_optional.items()})
    table.update({name: shape for name, shape in optional.items() if name in present})
    return table


def _layer_table(spec: ModelSpec, prefix: str, present: Collection[str]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Required and optional tensors of one layer, without the prefix."""
    family = spec.family
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    norms = {"before": ("attn_norm", family.ffn_norm), "after": ("post_attention_norm", "post_ffw_norm")}
    for name in norms.get(family.norms, (*norms["before"], *norms["after"])):
        required |= _norm(name, spec.hidden, family.adapter == "gpt")
    if family.qk_norm != "none":
        is_wide = family.qk_norm == "width"
        required["attn_q_norm.weight"] = (spec.q_width if is_wide else spec.head_dim,)
        required["attn_k_norm.weight"] = (spec.kv_width if is_wide else spec.head_dim,)
    if family.has_sinks:
        required["attn_sinks.weight"] = (spec.num_heads,)
    for name, form in _projections(spec, prefix, present).items():
        for piece, shape in form.items():
            required[f"{piece}.weight"] = shape
            (required if name in family.biases else optional)[f"{piece}.bias"] = shape[:-1]
    return required, optional


def _projections(spec: ModelSpec, prefix: str, present: Collection[str]) -> dict[str, dict[str, Shape]]:
    """Each projection of a layer as the matrices the file makes it of."""
    hidden = spec.hidden
    if f"{prefix}attn_qkv.weight" in present:
        qkv: dict[str, Shape] = {"attn_qkv": (spec.q_width + 2 * spec.kv_width, hidden)}
    else:
        widths = {"attn_q": spec.q_width, "attn_k": spec.kv_width, "attn_v": spec.kv_width}
        qkv = {name: (width, hidden) for name, width in widths.items()}
    found: dict[str, dict[str, Shape]] = {"attn_qkv": qkv, "attn_output": {"attn_output": (hidden, spec.q_width)}}
    if spec.experts is not None:
        return found | expert_projections(spec.experts, hidden)
    return found | _mlp_projections(spec, prefix, present)


def _mlp_projections(spec: ModelSpec, prefix: str, present: Collection[str]) -> dict[str, dict[str, Shape]]:
    hidden, ffn = spec.hidden, spec.ffn
    if not spec.family.is_gated:
        up: dict[str, Shape] = {"ffn_up": (ffn, hidden)}
    elif f"{prefix}ffn_gate.weight" in present:
        up = {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
    else:  # gate in the first half of the rows, up in the second
        up = {"ffn_up": (2 * ffn, hidden)}
    return {"ffn_up": up, "ffn_down": {"ffn_down": (hidden, ffn)}}


def _norm(name: str, width: int, has_bias: bool) -> dict[str, Shape]:
    return {f"{name}.{kind}": (width,) for kind in (("weight", "bias") if has_bias else ("weight",))}


def use_gguf_names(gguf: GgufFile) -> None:
    """Give tensors the names that GGUF has for them today.

    A GPT-2 file may have the checkpoint's (h.0.attn.c_attn.weight). Buffers that a checkpoint stores beside its
    weights (the causal mask) are left out. Early files with experts have a matrix for each (blk.0.ffn_up.3.weight);
    these become one. Raises ModelLoadFailed where such matrices differ in type or shape.
    """
    if gguf.architecture in ("gpt2", "gpt"):
        _rename_checkpoint(gguf)
    else:
        _stack_experts(gguf)


def _stack_experts(gguf: GgufFile) -> None:
    by_name: dict[str, dict[int, TensorInfo]] = {}
    for name, info in gguf.tensors.items():
        if match := EXPERT_NAME.fullmatch(name):
            by_name.setdefault(f"{match[1]}_exps.{match[3]}", {})[int(match[2])] = info
    whole = {  # others are refused, as what is left over and what is missing
        name: tuple(experts[number] for number in sorted(experts))
        for name, experts in by_name.items()
        if name not in gguf.tensors and max(experts) == len(experts) - 1
    }
    in_place = {parts[0].name: _stacked(name, parts) for name, parts in whole.items()}
    gone = {part.name for parts in whole.values() for part in parts[1:]}
    found = [in_place.get(name, info) for name, info in gguf.tensors.items() if name not in gone]
    gguf.tensors = MappingProxyType({info.name: info for info in found})


def _stacked(name: str, parts: tuple[TensorInfo, ...]) -> TensorInfo:
    first, nbytes = parts[0], sum(part.nbytes for part in parts)
    for other in parts:
        if (other.type, other.shape) != (first.type, first.shape):
            raise ModelLoadFailed(
                f"tensor {other.name} is {other.type.name} {list(other.shape)}, but {first.name} is "
                f"{first.type.name} {list(first.shape)}; experts must be alike"
            )
    return replace(first, name=name, shape=(len(parts), *first.shape), nbytes=nbytes, parts=parts)


def _rename_checkpoint(gguf: GgufFile) -> None:
    tensors = {}
    for name, info in gguf.tensors.items():
        stem, _, kind = name.removeprefix("transformer.").rpartition(".")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", stem)
        inner = CHECKPOINT_NAMES.get(layer[2] if layer else stem)
        new = name if inner is None else f"blk.{layer[1]}.{inner}.{kind}" if layer else f"{inner}.{kind}"
        if not (layer and layer[2] == "attn"):
            new = name if new in tensors else new  # twice there: one is left over, and refused as such
            tensors[new] = replace(info, name=new)
    gguf.tensors = MappingProxyType(tensors)


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
                if name in found and _plain(found[name].shape) != _plain(shape)
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


def _plain(shape: Shape) -> Shape:
    """Without leading ones, which some converters drop."""
    return _plain(shape[1:]) if shape[:1] == (1,) else shape


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{title}: {', '.join(names[:NAMES_SHOWN])}{more}"
