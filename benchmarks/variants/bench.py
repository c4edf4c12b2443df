"""Time attention in bf16, e4m3 and int8, each many times in a row; prints one table last."""

import concurrent.futures
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

import svg_kernels
from _harness import flush_l2
from _sparse_calls import svg2
from _sparse_workloads import WORKLOADS, structured
from attention_oracles import random_call
from attention_data import DATA, relative_error
from svg_attention import LayerMemory
from svg_attention.planning.order import long_tiles_first
from svg_attention.tiles import match_heads
from svg_kernels import Int8Key, _build, _library
from svg_kernels.attention_int8 import block_sparse_attention_int8
from svg_kernels.key_int8 import quantize_key

START = time.time()
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "packages/svg-kernels/csrc"
VARIANTS = ["heads", "headadd", "rowadd", "rowturns"]
DEVICE = torch.device("cuda", 0)


def say(*words):
    print(f"[{time.time() - START:5.1f}]", *words, flush=True)


def build_all():
    work = Path(tempfile.mkdtemp())
    base = work / "base-src"
    base.mkdir()
    for folder in ("attention", "ffi", "hopper", "ops"):
        shutil.copytree(CSRC / folder, base / folder)
    for path in (base / "ops").glob("*.cu"):
        if path.stem != "permute_rows":
            path.unlink()
    for path in (base / "attention").glob("*.cu"):
        if "block_sparse_attention" not in path.stem:
            path.unlink()
    folders = {"base": base, "before": HERE / "before"} | {v: HERE / v for v in VARIANTS}

    def build(name):
        try:
            return name, _build.build(folders[name], work / name, ("90",), jobs=4)
        except RuntimeError as error:
            say(name, "does not build:", str(error)[-800:])
            return name, None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(build, folders))
    for name, path in found.items():
        if path:
            report = (path.parent / _build.REPORT).read_text()
            spills = [l for l in report.splitlines() if "spill" in l and " 0 bytes spill stores" not in l]
            if spills or "serialized" in report:
                say(name, "spills:", len(spills), "serialized" if "serialized" in report else "")
    return {name: _library._load(path) for name, path in found.items() if path}


class Functions:
    def __init__(self, base):
        self.base = base
        self.chosen = {}

    def __getattr__(self, name):
        return getattr(self.chosen.get(name, self.base), name)


def on_gpu(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, (list, tuple)):
        return type(x)(on_gpu(part) for part in x)
    return {n: on_gpu(p) for n, p in x.items()} if isinstance(x, dict) else x


def full_plan(query, keys):
    shape = (*query.shape[:2], -(-query.shape[2] // 128), 1)
    starts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    return starts, torch.full_like(starts, keys)


def with_one_scale(rows):
    """Return keys with one scale for a head."""
    largest = rows.row_scale.amax(-1, keepdim=True)
    out = torch.empty_like(rows.key)
    for b in range(len(out)):
        for h in range(out.shape[1]):
            factor = (rows.row_scale[b, h] / largest[b, h])[:, None]
            out[b, h] = (rows.key[b, h].float() * factor).round().to(torch.int8)
    return Int8Key(key=out, row_scale=largest.expand_as(rows.row_scale).contiguous(),
                   channel_scale=rows.channel_scale, mean=rows.mean)


def cases():
    """Yield (name, query, key, value, starts, lengths, keywords, exact output and log-sum-exp)."""
    draw = torch.Generator().manual_seed(7)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    def reference(query, key, value, starts, lengths, keywords):
        known = {k: v for k, v in keywords.items() if k != "tile_order"}
        if "summary" in known:
            known["summary"] = tuple(x.float() for x in known["summary"])
        return svg_kernels.block_sparse_attention(
            query.float(), key.float(), value.float(), starts, lengths, return_lse=True,
            backend="reference", **known)

    for i in range(6):
        arguments, keywords = on_gpu(random_call(
            draw, dtype=[torch.bfloat16, torch.float16][i % 2], batch=integer(1, 2), heads=4,
            key_heads=[1, 2, 4][integer(0, 2)], queries=integer(1, 400), keys=integer(1, 3000), dim=128,
            runs=[1, 5, 40, 100][integer(0, 3)], summaries=[0, 0, 1, 130, 300][integer(0, 4)],
            ordered=bool(integer(0, 1)), magnitude=[1.0, 3.0, 12.0][integer(0, 2)], multiple=[1, 8][integer(0, 1)]))
        yield (f"plan {i}", *arguments, keywords, reference(*arguments, keywords))
    for keys in (127, 2500):
        arguments, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128, queries=300, keys=keys))
        query, key, value, *_ = arguments
        plan = full_plan(query, keys)
        yield (f"full {keys}", query, key, value, *plan, {}, reference(query, key, value, *plan, {}))
    for nats in (20.0, 60.0, -60.0, 150.0):
        arguments, _ = on_gpu(random_call(draw, dtype=torch.bfloat16, dim=128, queries=300, keys=1001))
        query, key, value, *_ = arguments
        direction = torch.randn(128, generator=draw).cuda()
        direction /= direction.norm()
        along = torch.linspace(-nats, nats, 1001, device="cuda")
        if nats == 150.0:  # one leap, farther than fp32 reaches
            along = torch.where(torch.arange(1001, device="cuda") < 500, -nats, nats / 2)
        key = (key + (along * 128**0.5 / 16)[:, None] * direction).to(query.dtype)
        query[:, :, 1::2] += (16 * direction).to(query.dtype)
        plan = full_plan(query, 1001)
        yield (f"rise {nats}", query, key, value, *plan, {}, reference(query, key, value, *plan, {}))
    for name in DATA:
        query, key, value = (x.cuda().bfloat16() for x in DATA[name](draw, 2, 4096))
        plan = full_plan(query, 4096)
        yield (name, query, key, value, *plan, {}, reference(query, key, value, *plan, {}))
    query, key, value = (x.cuda().bfloat16() for x in DATA["random"](draw, 2, 4096))
    key[:, :, 5::97] *= 100
    query = (query - (query.float() @ key[:, :, 5:6].float().mT) * key[:, :, 5:6].float() / key[:, :, 5:6].float().square().sum(-1, keepdim=True)).bfloat16()
    plan = full_plan(query, 4096)
    yield ("long keys", query, key, value, *plan, {}, reference(query, key, value, *plan, {}))


def errors_of(made, call, quantise):
    found = []
    for name, query, key, value, starts, lengths, keywords, (want, want_lse) in made:
        out = torch.full_like(query, torch.nan)
        _, lse = call(query, *quantise(key, value), starts, lengths, return_lse=True, out=out,
                      backend="cuda", **keywords)
        error = relative_error(out, want.double())
        if not torch.isfinite(out).all() or not torch.equal(torch.isneginf(lse), torch.isneginf(want_lse)):
            error = math.inf
        found.append(error)
    return found


def workloads():
    """Yield what is timed: name, query, key and value in plan order, plan, keywords, pairs."""
    for work in (WORKLOADS[0], WORKLOADS[2]):
        tensors = structured(work)
        query, key, value = tensors
        memory = LayerMemory()
        method = svg2(work)
        method.plan(*tensors, layout=work.layout, memory=memory)
        densities = (0.25, 0.10) if work is WORKLOADS[0] else (0.25,)
        for density in densities:
            kept = LayerMemory(query_centroids=memory.query_centroids, key_centroids=memory.key_centroids)
            plan = replace(method, density=density).plan(*tensors, layout=work.layout, memory=kept)
            if plan.run_multiple % 8:
                plan = plan.rounded(8)
            order = match_heads(plan.key_order, key.shape[1])
            tile_order = plan.tile_order if plan.tile_order is not None else long_tiles_first(plan.run_lengths)
            pairs = int(plan.run_lengths.sum(dtype=torch.int64)) * 128
            keywords = dict(query_order=plan.query_order, tile_order=tile_order.flatten())
            yield f"{work.name} {density:.0%}", query, key, value, order, plan.run_starts, plan.run_lengths, keywords, pairs
        if work is WORKLOADS[0]:
            pairs = query.shape[1] * query.shape[2] * key.shape[2]
            yield f"{work.name} dense", query, key, value, None, *full_plan(query, key.shape[2]), {}, pairs


def sampled(query, key, value, starts, lengths, keywords):
    """Return places of some rows, and what exact attention gives there; keys are in plan order."""
    order = keywords.get("query_order")
    places, wants = [], []
    heads, tiles = query.shape[1], starts.shape[2]
    for h in range(0, heads, max(1, heads // 3)):
        for t in range(1, tiles, max(1, tiles // 5)):
            rows = torch.arange(t * 128, min(t * 128 + 128, query.shape[2]), 8, device=query.device)
            rows = rows if order is None else order[0, h, rows].long()
            s, l = starts[0, h, t].tolist(), lengths[0, h, t].tolist()
            index = torch.cat([torch.arange(a, a + n, device=query.device) for a, n in zip(s, l) if n])
            logits = query[0, h, rows].double() @ key[0, h, index].double().T * 128**-0.5
            wants.append(torch.softmax(logits, -1) @ value[0, h, index].double())
            places.append((h, rows))
    return places, torch.cat(wants)


def clock():
    try:
        import subprocess
        return subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-i", "0"],
                              capture_output=True, text=True, timeout=5).stdout.strip()
    except Exception as error:  # noqa: BLE001
        return repr(error)[:40]


def timed(call, runs=12, kept=6):
    """Return the median of the last runs in ms, and clock and power while they went on."""
    found = []
    for _ in range(runs):
        a, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush_l2()
        a.record(); call(); e.record()
        found.append((a, e))
    found[runs - 3][1].synchronize()
    state = clock()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(e) for a, e in found[-kept:]), state


def main():
    torch.manual_seed(0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        building = pool.submit(build_all)
        torch.zeros(1, device="cuda")
        libraries = building.result()
    functions = Functions(libraries["base"])
    _library._libraries[DEVICE] = _library.Library(functions=functions)
    _library._libraries[torch.device("cuda")] = _library._libraries[DEVICE]
    say(torch.cuda.get_device_name(), torch.__version__, "built", ", ".join(libraries))
    made = list(cases())
    for name, query, key, *_ in made:
        a, b = quantize_key(key), quantize_key(key, backend="reference")
        far = (a.key.int() - b.key.int()).abs()
        say("quantiser", name, "largest difference", int(far.max()), f"share {float((far > 0).float().mean()):.4f}",
            "scales", f"{float(((a.row_scale - b.row_scale).abs() / b.row_scale).max()):.1e}")
    e4m3 = errors_of(made, svg_kernels.block_sparse_attention_fp8, lambda k, v: (svg_kernels.quantize_key_value(k, v),))
    int8 = errors_of(made, block_sparse_attention_int8, lambda k, v: (quantize_key(k), v))
    for variant in VARIANTS:
        if variant not in libraries:
            continue
        functions.chosen["block_sparse_attention_int8"] = libraries[variant]
        one = with_one_scale if variant.startswith("head") else lambda x: x
        found = errors_of(made, block_sparse_attention_int8, lambda k, v: (one(quantize_key(k)), v))
        bad = [f"{m[0]} {new:.4f} ({old:.4f})" for m, new, old in zip(made, found, int8) if not new < (3 if variant.startswith("head") else 1.05) * old + 1e-3]
        say(variant, "worse than int8:", "; ".join(bad[:6]) or "nowhere")
    functions.chosen.clear()
    say("errors, int8 and e4m3:", {m[0]: f"{a:.4f} {b:.4f}" for m, a, b in zip(made, int8, e4m3)})
    table, far, work = {}, {}, []
    kernels = []
    for name, query, key, value, order, starts, lengths, keywords, pairs in workloads():
        work.append(name)
        try:
            both = [key, value] if order is None else svg_kernels.permute_rows([key, value], order)
            fp8 = svg_kernels.quantize_key_value(key, value, order)
            rows = quantize_key(key, order)
            one = with_one_scale(rows)
            places, want = sampled(query, *both, starts, lengths, keywords)
            plain, e4, i8 = "block_sparse_attention", "block_sparse_attention_fp8", "block_sparse_attention_int8"
            calls = {
                "bf16 before": (plain, "before", (query, *both)),
                "bf16": (plain, "base", (query, *both)),
                "e4m3 before": (e4, "before", (query, fp8)),
                "e4m3": (e4, "base", (query, fp8)),
                "int8": (i8, "base", (query, rows, both[1])),
                **{v: (i8, v, (query, one if v.startswith("head") else rows, both[1])) for v in VARIANTS},
            }
            calls = {k: c for k, c in calls.items() if c[1] in libraries}
            for kernel, (function, library, operands) in calls.items():
                functions.chosen[function] = libraries[library]
                entry = getattr(svg_kernels, function)

                def call():
                    return entry(*operands, starts, lengths, backend="cuda", **keywords)

                out = call()
                got = torch.cat([out[0, h, rows_] for h, rows_ in places])
                far[name, kernel] = relative_error(got, want)
                del out
                ms, state = timed(call)
                table[name, kernel] = (ms, 4 * 128 * pairs / ms / 1e9, state)
                if kernel not in kernels:
                    kernels.append(kernel)
        except Exception:  # noqa: BLE001
            say(name, "fails:", traceback.format_exc()[-800:])
        both = fp8 = rows = one = want = None
        torch.cuda.empty_cache()
        say(name, {v: f"{table[name, v][1]:.0f}" for v in kernels if (name, v) in table})
    print("TFLOP/s, ms, error on sampled rows against fp64; MHz, W")
    print("| kernel | " + " | ".join(work) + " |\n" + "| --- " * (1 + len(work)) + "|")
    for v in kernels:
        row = [f"{table[n, v][1]:.0f}, {table[n, v][0]:.2f} ms, {far[n, v]:.2%}; {table[n, v][2]}" if (n, v) in table else "" for n in work]
        print(f"| {v} | " + " | ".join(row) + " |")
    say("done")


main()
