"""Model folders that strangers could send: one change each to a small pipeline that works."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MALFORMED"]

Change = Callable[[Path], None]
MALFORMED: dict[str, Change] = {}
"""What is wrong -> the function that makes a folder so."""

NETWORKS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CONFIGS = {
    "index": "model_index.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer.json",
}


def case(name: str, change: Change) -> None:
    assert name not in MALFORMED, name
    MALFORMED[name] = change


def text(path: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / path).write_bytes(data) and None  # type: ignore[func-returns-value]


def values(path: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        document.update(changes)
        (folder / path).write_text(json.dumps(document))

    return change


def raw_value(path: str, key: str, literal: str) -> Change:
    """Set a key to something that `json.dumps` would not write."""

    def change(folder: Path) -> None:
        document = json.loads((folder / path).read_text())
        document[key] = "@@"
        (folder / path).write_text(json.dumps(document).replace('"@@"', literal))

    return change


def without(path: str) -> Change:
    def change(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def as_folder(path: str) -> Change:
    def change(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).mkdir()

    return change


def as_loop(path: str) -> Change:
    def change(folder: Path) -> None:
        without(path)(folder)
        (folder / path).symlink_to((folder / path).name)

    return change


def as_pipe(path: str) -> Change:
    def change(folder: Path) -> None:
        (folder / path).unlink()
        os.mkfifo(folder / path)

    return change


def as_zeros(path: str) -> Change:
    def change(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).symlink_to("/dev/zero")

    return change


def cut(path: str, keep: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * keep)])

    return change


def header(path: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Rewrite the header of a safetensors file and leave what follows it."""

    def change(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        changed = edit(entries)
        written = json.dumps(entries if changed is None else changed).encode()
        (folder / path).write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])

    return change


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in entries.items() if key != "__metadata__")


# The index.
for name, content in {
    "a list": "[]",
    "a number": "7",
    "empty": "",
    "null": "null",
    "broken": '{"_class_name": "WanPipeline",',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "not UTF-8": b"\xff\xfe\x00{",
    "a huge number": '{"_class_name": "WanPipeline", "x": ' + "9" * 10_000 + "}",
    "two megabytes": '{"_class_name": "WanPipeline", "x": "' + "a" * (2 << 20) + '"}',
    "nothing in it": "{}",
}.items():
    case(f"index: {name}", text(CONFIGS["index"], content))
for name, value in {
    "a list": ["diffusers", "WanPipeline"],
    "a number": 3,
    "unknown": "WanPipelineOfTomorrow",
    "no pipeline": "AutoencoderKLWan",
    "a module": "utils",
    "a function": "is_torch_available",
    "an attribute": "__init__",
    "controls": "\x1b]0;owned\x07",
    "a path": "../../WanPipeline",
}.items():
    case(f"pipeline: {name}", values(CONFIGS["index"], _class_name=value))
for name, value in {
    "of a module in the folder": ["evil", "X"],
    "of a dotted module": ["os.path", "join"],
    "of the standard library": ["subprocess", "Popen"],
    "of torch": ["torch", "load"],
    "three words": ["diffusers", "AutoencoderKLWan", "x"],
    "one word": ["diffusers"],
    "numbers": [1, 2],
    "half null": ["diffusers", None],
    "nested": [["diffusers"], {"a": 1}],
    "an unknown class": ["diffusers", "AutoencoderOfTomorrow"],
    "a dummy": ["diffusers", "logging"],
    "an automatic class": ["transformers", "AutoModel"],
    "a class that loads anything": ["diffusers", "DiffusionPipelineX"],
    "another network": ["diffusers", "UNet2DModel"],
    "a scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "controls": ["diffusers", "Auto\x1b[31mencoder\u202eKLWan"],
}.items():
    case(f"vae: {name}", values(CONFIGS["index"], vae=value))
case("component: a path", values(CONFIGS["index"], **{"../../etc": ["diffusers", "AutoencoderKL"]}))
case(
    "component: controls", values(CONFIGS["index"], **{"a\x1b[2J": ["diffusers", "AutoencoderKL"]})
)
case("component: no folder", values(CONFIGS["index"], image_encoder=["transformers", "CLIPModel"]))
case("no transformer", values(CONFIGS["index"], transformer=[None, None]))
case("no tokenizer", values(CONFIGS["index"], tokenizer=[None, None]))
case("code beside the weights", text("vae/diffusers.py", "raise SystemExit('ran')"))
case(
    "an adapter of elsewhere",
    text("text_encoder/adapter_config.json", '{"base_model_name_or_path": "somebody/else"}'),
)

# Files that are no files.
for part, path in CONFIGS.items():
    case(f"{part}: a folder", as_folder(path))
    case(f"{part}: a loop of links", as_loop(path))
    case(f"{part}: a pipe", as_pipe(path))
for part in ("transformer", "vae", "scheduler"):
    case(f"{part}: an endless device", as_zeros(CONFIGS[part]))
for part in ("transformer", "vae", "text_encoder", "scheduler", "tokenizer"):
    case(f"{part}: missing", without(part))
    case(f"{part}: empty", text(CONFIGS[part], ""))
    case(f"{part}: a list", text(CONFIGS[part], "[1, 2]"))
    case(f"{part}: deep", text(CONFIGS[part], '{"a":' * 50_000))
    case(f"{part}: not UTF-8", text(CONFIGS[part], b'{"a": "\xff"}'))

# Configurations.
for name, changes in {
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -4},
    "heads a text": {"num_attention_heads": "four"},
    "a fraction of heads": {"num_attention_heads": 2.5},
    "heads null": {"num_attention_heads": None},
    "heads a list": {"num_attention_heads": [2, 2]},
    "heads an object": {"num_attention_heads": {"n": 2}},
    "a billion heads": {"num_attention_heads": 10**9},
    "a billion layers": {"num_layers": 10**9},
    "a thousand digits": {"num_layers": 10**1000},
    "no layers": {"num_layers": 0},
    "negative width": {"ffn_dim": -1},
    "a huge width": {"ffn_dim": 2**31 - 1, "num_attention_heads": 65536},
    "a billion positions": {"rope_max_seq_len": 10**9},
    "negative positions": {"rope_max_seq_len": -1},
    "odd head size": {"attention_head_dim": 7},
    "patch of zero": {"patch_size": [0, 1, 1]},
    "patch of text": {"patch_size": "1,1,1"},
    "patch of two": {"patch_size": [1, 1]},
    "no channels": {"in_channels": 0},
    "another class": {"_class_name": "\x1b]0;x\x07", "num_layers": -1},
    "deep values": {"extra": json.loads("[" * 60 + "]" * 60)},
    "other weights": {"num_layers": 5},
    "wider than its weights": {"ffn_dim": 64},
}.items():
    case(f"transformer: {name}", values(CONFIGS["transformer"], **changes))
case("transformer: NaN", raw_value(CONFIGS["transformer"], "eps", "NaN"))
case("transformer: infinite", raw_value(CONFIGS["transformer"], "ffn_dim", "Infinity"))
for name, changes in {
    "no base": {"base_dim": 0},
    "a latent of zero": {"z_dim": 0},
    "no stages": {"dim_mult": []},
    "a stage of zero": {"dim_mult": [0, 1, 1]},
    "stages a text": {"dim_mult": "1,2"},
    "a short mean": {"latents_mean": "zero"},
    "a million blocks": {"num_res_blocks": 10**6},
}.items():
    case(f"vae: {name}", values(CONFIGS["vae"], **changes))
for name, changes in {
    "no words": {"vocab_size": 0},
    "words a text": {"vocab_size": "many"},
    "words without end": {"vocab_size": 2**40},
    "a width of zero": {"d_model": 0},
    "layers negative": {"num_layers": -1},
    "an unknown activation": {"feed_forward_proj": "\x1b[31ma-b-c"},
    "kernels of the hub": {"_attn_implementation": "somebody/kernels"},
    "a wrong type": {"dropout_rate": {"a": 1}},
}.items():
    case(f"text_encoder: {name}", values(CONFIGS["text_encoder"], **changes))
for name, changes in {
    "a billion steps": {"num_train_timesteps": 10**9},
    "no steps": {"num_train_timesteps": 0},
    "steps a text": {"num_train_timesteps": "all"},
    "an unknown schedule": {"beta_schedule": "\x07nothing"},
    "an unknown solver": {"solver_type": ["a"]},
    "betas a text": {"trained_betas": "x"},
}.items():
    case(f"scheduler: {name}", values(CONFIGS["scheduler"], **changes))
case("tokenizer: another kind", text(CONFIGS["tokenizer"], '{"version": "1.0", "model": {}}'))
case("tokenizer: its configuration a list", text("tokenizer/tokenizer_config.json", "[]"))

# Weights.
for part, file in NETWORKS.items():
    path = f"{part}/{file}"
    case(f"{part}: no weights", without(path))
    case(f"{part}: weights empty", text(path, b""))
    case(f"{part}: weights cut off", cut(path, 0.6))
    case(f"{part}: header cut off", cut(path, 0.01))
    case(f"{part}: weights a folder", as_folder(path))
    case(f"{part}: weights a loop", as_loop(path))
path = f"transformer/{NETWORKS['transformer']}"
case("weights: a header of 2^63 bytes", text(path, struct.pack("<Q", 2**63) + b"{}"))
case("weights: a header of 2 GB", text(path, struct.pack("<Q", 2**31) + b"{}" * 100))
case("weights: no JSON", text(path, struct.pack("<Q", 4) + b"\x00\x01\x02\x03"))
case("weights: a deep header", text(path, struct.pack("<Q", 60_000) + b"[" * 60_000))
case("weights: a list", text(path, struct.pack("<Q", 2) + b"[]"))
case("weights: nothing in it", text(path, struct.pack("<Q", 2) + b"{}"))
case("weights: a text file", text(path, "version https://git-lfs.github.com/spec/v1\noid sha256:0"))
case("weights: a huge shape", header(path, lambda e: first(e).update(shape=[2**40, 2**40])))
case("weights: a negative shape", header(path, lambda e: first(e).update(shape=[-1])))
case("weights: another shape", header(path, lambda e: first(e).update(shape=[1])))
case("weights: another type", header(path, lambda e: first(e).update(dtype="F64")))
case("weights: an unknown type", header(path, lambda e: first(e).update(dtype="\x1b[2J")))
case("weights: a place beyond", header(path, lambda e: first(e).update(data_offsets=[0, 2**50])))
case("weights: a place reversed", header(path, lambda e: first(e).update(data_offsets=[9, 3])))
case("weights: one left out", header(path, lambda e: e.pop(sorted(e)[-1]) and None))
case(
    "weights: all renamed",
    header(path, lambda e: {f"x.{k}": v for k, v in e.items() if k != "__metadata__"}),
)


def pickled(folder: Path) -> None:
    """Leave the weights in a format that runs code, with code that says so."""
    (folder / path).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(
        b"cbuiltins\nexec\n(S'raise SystemExit(\"ran\")'\ntR."
    )


case("weights: a pickle", pickled)


def sharded(weight_map: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / path).unlink()
        place = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        place.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


case("shards: none", sharded({}))
case("shards: a list", sharded(["a"]))
case("shards: elsewhere", sharded({"a": "../../../etc/passwd"}))
case("shards: absolute", sharded({"a": "/etc/passwd"}))
case("shards: missing", sharded({"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}))
case("shards: a number", sharded({"a": 1}))
