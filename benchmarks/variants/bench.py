"""Time attention in bf16, e4m3 and int8, each many times in a row; prints one table last."""

import concurrent.futures
import json
import math
import os
import re
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
# Name: function, folder, operands.
PLAIN, E4, I8 = "block_sparse_attention", "block_sparse_attention_fp8", "block_sparse_attention_int8"
VARIANTS = {
    "bf16": (PLAIN, "base", "plain"),
    "bf16 steps": (PLAIN, "bfsteps", "plain"),
    "bf16 q1": (PLAIN, "q1", "plain"),
    "bf16 q3": (PLAIN, "q3", "plain"),
    "bf16 q4": (PLAIN, "q4", "plain"),
    "bf16 q5": (PLAIN, "q5", "plain"),
    "e4m3": (E4, "base", "e4m3"),
    "e4m3 12": (E4, "e12", "e4m3"),
    "e4m3 12 t1": (E4, "e12t1", "e4m3"),
    "e4m3 12 t2": (E4, "e12t2", "e4m3"),
    "mixed 12": (E4, "m12", "mixed"),
    "mixed 12 t1": (E4, "m12t1", "mixed"),
    "mixed 12 t2": (E4, "m12t2", "mixed"),
    "int8": (I8, "heads", "head"),
    "int8 add": (I8, "headadd", "head"),
    "int8 turns": (I8, "headturns", "head"),
    "int8 12": (I8, "h12", "head"),
    "int8 12 t1": (I8, "h12t1", "head"),
    "int8 12 t2": (I8, "h12t2", "head"),
    "int8 10": (I8, "h10", "head"),
}
CHOSEN = os.environ.get("KERNELS", "")  # a regular expression
DEVICE = torch.device("cuda", 0)


def say(*words):
    print(f"[{time.time() - START:5.1f}]", *words, flush=True)


def build_all():
    """Load the libraries that came along, or build those that do not load."""
    work = Path(tempfile.mkdtemp())
    found = {}

    def build(name):
        path = HERE / "lib" / f"{name}.so"
        try:
            return name, _library._load(path)
        except Exception as error:  # noqa: BLE001
            say(name, "does not load:", str(error)[:200])
        try:
            return name, _library._load(_build.build(HERE / name, work / name, ("90",), jobs=4))
        except RuntimeError as error:
            say(name, "does not build:", str(error)[-800:])
            return name, None

    names = sorted({folder for _, folder, _ in VARIANTS.values()})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(build, names))
    return {name: library for name, library in found.items() if library}


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


def operands_of(kind, key, value, order=None, both=None):
    """Return the operands behind the query of a kind of kernel."""
    if kind == "plain":
        return both or ([key, value] if order is None else svg_kernels.permute_rows([key, value], order))
    if kind == "head":
        return with_one_scale(quantize_key(key, order)), (both or [None, value])[1]
    fp8 = svg_kernels.quantize_key_value(key, value, order)
    if kind == "mixed":
        rows = with_one_scale(quantize_key(key, order))
        scale = rows.channel_scale * rows.row_scale[..., :1]
        fp8 = replace(fp8, key=rows.key.view(fp8.key.dtype), key_scale=scale.contiguous(), key_mean=rows.mean)
    return (fp8,)


def errors_of(made, call, kind):
    found = []
    for name, query, key, value, starts, lengths, keywords, (want, want_lse) in made:
        out = torch.full_like(query, torch.nan)
        _, lse = call(query, *operands_of(kind, key, value), starts, lengths, return_lse=True, out=out,
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
    chosen = {name: found for name, found in VARIANTS.items()
              if found[1] in libraries and re.search(CHOSEN, name)}
    errors = {}
    for name, (function, library, kind) in chosen.items():
        functions.chosen[function] = libraries[library]
        try:
            errors[name] = errors_of(made, getattr(svg_kernels, function), kind)
        except Exception:  # noqa: BLE001
            say(name, "fails:", traceback.format_exc()[-600:])
            continue
        torch.cuda.synchronize()
    cases_ = [m[0] for m in made]
    say("errors against fp64:")
    print("| kernel | " + " | ".join(cases_) + " |\n" + "| --- " * (1 + len(cases_)) + "|")
    for name, found in errors.items():
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in found) + " |")
    sys.stdout.flush()
    table, far, work = {}, {}, []
    for name, query, key, value, order, starts, lengths, keywords, pairs in workloads():
        work.append(name)
        both = [key, value] if order is None else svg_kernels.permute_rows([key, value], order)
        places, want = sampled(query, *both, starts, lengths, keywords)
        ready = {}
        for kernel, (function, library, kind) in chosen.items():
            if kernel not in errors:
                continue
            try:
                if kind not in ready:
                    ready.clear()
                    ready[kind] = operands_of(kind, key, value, order, both)
                functions.chosen[function] = libraries[library]
                entry = getattr(svg_kernels, function)

                def call():
                    return entry(query, *ready[kind], starts, lengths, backend="cuda", **keywords)

                out = call()
                got = torch.cat([out[0, h, rows_] for h, rows_ in places])
                far[name, kernel] = relative_error(got, want)
                del out
                ms, state = timed(call)
                table[name, kernel] = (ms, 4 * 128 * pairs / ms / 1e9, state)
            except Exception:  # noqa: BLE001
                say(name, kernel, "fails:", traceback.format_exc()[-800:])
        both = want = None
        ready.clear()
        torch.cuda.empty_cache()
        say(name, {v: f"{table[name, v][1]:.0f}" for v in chosen if (name, v) in table})
    print("TFLOP/s, ms, error on sampled rows against fp64; MHz, W")
    print("| kernel | " + " | ".join(work) + " |\n" + "| --- " * (1 + len(work)) + "|")
    for v in chosen:
        row = [f"{table[n, v][1]:.0f}, {table[n, v][0]:.2f} ms, {far[n, v]:.2%}; {table[n, v][2]}" if (n, v) in table else "" for n in work]
        print(f"| {v} | " + " | ".join(row) + " |")
    out = os.environ.get("OUT")
    if out:
        Path(out, "kernels.json").write_text(json.dumps({
            "gpu": torch.cuda.get_device_name(), "errors": {"cases": cases_} | errors,
            "times": [{"workload": n, "kernel": v, "ms": t[0], "tflops": t[1], "state": t[2], "error": far[n, v]}
                      for (n, v), t in table.items()]}, indent=1))
    say("done")


if __name__ == "__main__":
    main()
