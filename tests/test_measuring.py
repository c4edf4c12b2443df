"""What the measuring scripts refuse, in a sentence: files, lanes, cases and counts."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import inspect
import json
import weakref
from pathlib import Path

import pytest
import torch

import svg_models
from svg_attention.memory import LayerMemory

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    """Return what imports a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read .*none.json"),
        ("# a page", "no stored result"),
        ("[1]", "no JSON object"),
    ],
)
def test_stored_refuses_what_is_no_result(script, tmp_path, text, said):
    path = tmp_path / "none.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=said):
        script("_harness").stored(path)


def test_at_least_refuses_less(script):
    whole = script("_harness").at_least(2)
    assert whole("2") == 2
    with pytest.raises(argparse.ArgumentTypeError, match="2 or more is needed, got 1"):
        whole("1")


@pytest.mark.parametrize("text", ["2/2", "0/0", "-1/2", "0", "a/b", ""])
def test_lane_refuses_what_is_none(script, text):
    lane = script("quality").lane
    assert lane("1/2") == (1, 2)
    with pytest.raises(argparse.ArgumentTypeError, match="0/2 and 1/2"):
        lane(text)


def test_join_refuses_what_is_no_lane(script, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"environment": {}, "judge": "embedded"}))
    with pytest.raises(SystemExit, match=r"no lane of `quality\.py run`: it has no guidance"):
        script("quality").join([path], tmp_path / "joined.json")
    assert not (tmp_path / "joined.json").exists()


def test_load_refuses_a_folder_without_a_pipeline(script, tmp_path):
    args = argparse.Namespace(model=tmp_path)
    with pytest.raises(SystemExit, match="holds no pipeline"):
        script("quality").load(args)


@pytest.mark.parametrize("pattern", ["nosuch", "*"])
def test_named_refuses_a_pattern_that_is_in_no_name(script, pattern):
    named = script("_harness").named
    assert named("video", ["Wan 1", "Wan 2"], ["wAn .$"]) == ["Wan 1", "Wan 2"]
    assert named("video", ["Wan 1", "Wan 2"], []) == ["Wan 1", "Wan 2"]
    with pytest.raises(SystemExit, match="video"):
        named("video", ["Wan 1", "Wan 2"], ["Wan", pattern])


def test_precision_refuses_a_row_that_nothing_has(script):
    with pytest.raises(SystemExit, match="no row is named int8; there are blocks as they are"):
        script("quality_precision").run(argparse.Namespace(rows=["int8"]))


def test_table_of_videos_refuses_a_gpu_without_results(script):
    tables = script("_video_tables")
    pages = [page.read_text("utf-8") for page in tables.PAGES]
    with pytest.raises(SystemExit, match="name a stored result"):
        tables.write_table(argparse.Namespace(gpu="nosuch", name="videos"))
    assert pages == [page.read_text("utf-8") for page in tables.PAGES]


@pytest.mark.parametrize(("option", "kind"), [("models", "model"), ("ways", "way")])
def test_several_gpus_refuses_a_name_that_nothing_has(script, option, kind):
    args = argparse.Namespace(tiny=True, gpus=2, on=[], models=[], ways=[])
    setattr(args, option, ["nosuch"])
    with pytest.raises(SystemExit, match=f"no {kind} is named nosuch; there are "):
        script("bench_gpus").run(args)


def test_several_gpus_refuses_a_number_that_there_is_not(script):
    args = argparse.Namespace(tiny=True, gpus=2, on=[1, 4], models=[], ways=[])
    with pytest.raises(SystemExit, match=r"cannot time 4 of 2 GPUs; choose among \[1, 2\]"):
        script("bench_gpus").run(args)


@pytest.mark.parametrize(("rank", "own"), [(0, [0, 1]), (3, [2, 3]), (4, None)])
def test_several_gpus_every_rank_is_in_a_group_where_there_are_enough(
    script, rank, own, monkeypatch
):
    bench, made = script("bench_gpus"), []
    monkeypatch.setattr(bench.dist, "new_group", lambda ranks: made.append(ranks) or ranks)
    assert bench.team_of(rank, 5, 2) == own
    assert made == [[0, 1], [2, 3]], "all ranks ask for all groups"


@pytest.mark.parametrize(
    ("way", "module", "name"),
    [
        ("shared_without_engines", "copies", "copy_by_engine"),
        ("shared_with_values", "attention_op", "begin"),
    ],
)
def test_ways_to_exchange_keep_no_tensor_of_a_call(script, way, module, name, monkeypatch):
    bench = script("bench_gpus")
    monkeypatch.setattr(bench, "shared", lambda *_: contextlib.nullcontext())
    replaced = getattr(getattr(bench, module), name)
    with getattr(bench, way)(None, None):
        call = getattr(getattr(bench, module), name)
        assert call is not replaced
        tensors = [torch.zeros(3) for _ in inspect.signature(replaced).parameters]
        alive = [weakref.ref(x) for x in tensors]
        call(*tensors)
        del tensors
        assert [x() for x in alive] == [None] * len(alive)


def test_rows_of_ways_without_what_they_are_held_against(script):
    ms = {"median": 8.0, "q1": 8.0, "q3": 8.0}
    model = {"name": "toy", "layers": 2, "ms_per_forward": {"SVG2, ring": {"2": ms}}}
    rows = script("bench_gpus").rows_of({**model, "held_against": {"SVG2, ring": "SVG2"}})
    assert rows == [["toy", "SVG2, ring", "", "4.0", "", ""]]


def test_lines_of_several_runs_are_the_newest(script):
    def run(commit, layers, how, times, exchange):
        ms = {way: {n: {"median": t} for n, t in found.items()} for way, found in times.items()}
        model = {"name": "toy", "layers": layers, "ms_per_forward": ms}
        model |= {"held_against": {"SVG2": "SVG2", "ring": "SVG2"}, "imbalance_by_step": {}}
        model |= {"distance_to_one_gpu": {"ring": {"2": 2e-3, "4": 5e-3}, "SVG2": {"2": 0.0}}}
        model |= {"exchanged": {"SVG2": {"2": how}}, "ms_of_exchange_per_layer": exchange}
        return {"environment": {"commit": commit}, "models": [model]}

    bench = script("bench_gpus")
    old = run("a", 2, "collective", {"SVG2": {"1": 8.0, "4": 4.0}, "ring": {"4": 5.0}}, {"4": 3.0})
    new = run("b", 4, "direct, 9 MB", {"SVG2": {"1": 16.0, "2": 8.0}}, {})
    assert bench.lines_of([old, new]) == [
        ["toy", "SVG2", "4", "direct", "4.0", "2.0 (2.00x)", "", "", "0", "b"],
        ["toy", "ring", "2", "NCCL", "", "", "2.5 (1.60x)", "", "0.5%", "a"],
    ]
    assert bench.exchanges_of([old, new]) == [["toy", "NCCL", "", "", "3.00", "", "a"]]
    text = bench.written([old, new])
    assert "| model | attention | layers | exchange | 1 GPU | 2 GPUs | 4 GPUs |" in text
    assert "8 GPUs" not in text


def tried(card, ran, size=37.0):
    return {"card": card, "ran": ran, "bytes": size * 2**30}


@pytest.mark.parametrize(
    ("size", "runs", "card", "settled"),
    [
        (37.0, [tried(40, True)], 40, True),
        (37.0, [], 40, False),
        (37.0, [tried(40, False)], 48, False),
        (37.0, [tried(40, False), tried(48, True)], 48, True),
        (42.0, [tried(40, True)], 48, False),  # counted anew: it ran with less, where it cannot
        (37.4, [tried(40, True)], 40, False),
        (37.0, [tried(40, False, 37.5)], 40, False),  # it failed with more than it needs
        (38.0, [], 48, False),  # so close to the card, runs fail
        (36.9, [tried(48, True)], 48, False),  # where it may fit now, it was not tried
        (77.9, [tried(80, False, 77.9)], None, True),
        (90.0, [], None, True),
    ],
)
def test_card_of_is_where_as_much_ran(script, size, runs, card, settled):
    bench = script("bench_memory")
    way = {"offload": "none", "bytes": size * 2**30, "runs": runs}
    assert bench.card_of(way["bytes"], runs) == card
    assert bench.is_settled(way) is settled
    assert bench.is_settled({**way, "offload": "group"})


@pytest.mark.parametrize(
    ("size", "runs", "cell"),
    [
        (37.0, [tried(40, True)], "37.0, 40 GB"),
        (37.0, [], "37.0, 40 GB †"),
        (37.0, [tried(40, False)], "37.0, 48 GB † ‡"),
        (37.0, [tried(40, False), tried(48, True)], "37.0, 48 GB ‡"),
        (77.9, [tried(80, False, 77.9)], "77.9, none ‡"),
        (77.9, [], "77.9, none †"),
        (90.0, [], "90.0, none"),
    ],
)
def test_cell_of_marks_what_was_not_run_and_what_failed(script, size, runs, cell):
    bench = script("bench_memory")
    size *= 2**30
    way = {"offload": "none", "bytes": size, "runs": runs, "card": bench.card_of(size, runs)}
    assert bench.cell_of(way) == cell


def test_describe_counts_what_stays_in_bf16_where_weights_are_stored_in_fp8(script):
    bench = script("bench_memory")
    video = next(one for one in bench.TINY if one.name == "tiny HunyuanVideo")
    told = bench.describe(video)
    model = video.build("meta").transformer
    # diffusers leaves all below these as they are: of HunyuanVideo, what modulates the norms
    kept = ("x_embedder", "context_embedder", "norm", "proj_out")
    linears = (m for m in model.named_modules() if isinstance(m[1], torch.nn.Linear))
    cast = [
        m for name, m in linears if not any(word in name for word in kept[:3]) and name != kept[3]
    ]
    elements = [sum(x.numel() for x in m.parameters()) for m in cast]
    assert told["fp8"] == [told["transformers"][0] - sum(elements)]
    assert told["cast"] == 2 * max(elements)
    way = bench.Way(offload="none", weights="fp8", steps="SVG2")
    found = {"SVG2": {"activations": 7.0}}
    held = told["fp8"][0] + told["vae"] + told["text"] + told["centroids"]
    assert bench.need(way, told, found, 0.0, {}) == held + told["cast"] + 7


@pytest.mark.parametrize("name", ["tiny HunyuanVideo", "tiny CogVideoX 1.5"])
def test_centroids_are_counted_as_sparse_attention_keeps_them(script, name):
    bench = script("bench_memory")
    video = next(one for one in bench.TINY if one.name == name).short
    pipe, held = video.build("cpu"), []
    count = bench.measured_centroids(video, pipe)

    def keep(*_):
        memories = [x for x in gc.get_objects() if type(x) is LayerMemory]
        kept = [x for m in memories for x in (m.query_centroids, m.key_centroids)]
        held.append(sum(x.nbytes for x in kept if x is not None))

    pipe.transformer.register_forward_hook(keep)
    with svg_models.sparsify(pipe, bench.svg2(video), bench.Schedule(dense_steps=0.0)):
        arguments = dict(video.arguments) | video.embeddings("cpu")
        pipe(**arguments, num_inference_steps=2, output_type="latent")
    assert held[-1] == count > 0
