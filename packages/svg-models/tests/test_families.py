"""The registry, and the page that explains how to add a family: its code is run here."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    LTXVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
)
from packaging.version import Version
from zoo import chronoedit as zoo_chronoedit
from zoo import ltx2 as zoo_ltx2
from zoo import wan as zoo_wan
from zoo import wan_animate as zoo_wan_animate

from svg_attention import SVG2, Dense, Schedule
from svg_models import families, sparsify
from svg_models.families.base import Family
from svg_models.families.wan import WAN
from svg_models.recipes import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parents[3] / "docs" / "guide" / "adding-a-model.md"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """Let a test add families that are gone after it."""
    known = list(families.known_families())
    monkeypatch.setattr(families, "_families", known)
    return known


def expanded(text: str) -> str:
    """Put the files that the page includes into its text."""
    root = PAGE.parents[2]
    return re.sub(
        r"^--8<-- \"(.*)\"\n", lambda m: (root / m[1]).read_text(encoding="utf-8"), text, flags=re.M
    )


@pytest.fixture
def page(registry: list[Family]) -> dict[str, Any]:
    """Run every code block of the page, in order, in one namespace."""
    if not PAGE.exists():
        pytest.skip("the documentation is not part of this checkout")
    names: dict[str, Any] = {}
    text = expanded(PAGE.read_text(encoding="utf-8"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def like_wan(kind: Any, **changes: Any) -> Any:
    """Return a tiny transformer of a class with Wan's settings."""
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    model = kind(**(settings | changes)).eval()
    tiny.sharpen(model)
    return model


def test_family_of_the_page_adds_a_copy_of_wan(page: dict[str, Any]) -> None:
    assert page["CHRONOEDIT"] == families.family_of(like_wan(ChronoEditTransformer3DModel))
    model = like_wan(ChronoEditTransformer3DModel)
    inputs = {k: v for k, v in tiny.forward_inputs().items() if k != "return_dict"}
    page["check_family"](model, inputs)


def test_family_of_the_page_shows_all_of_ltx(page: dict[str, Any]) -> None:
    assert page["LTX"].transformers == families.ltx.LTX.transformers
    lines = Path(families.ltx.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    page["check_family"](tiny_ltx(), ltx_inputs())


def tiny_ltx() -> LTXVideoTransformer3DModel:
    torch.manual_seed(3)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    tiny.sharpen(model)
    return model


def ltx_inputs() -> dict[str, Any]:
    frames, rows, columns = tiny.GRID
    return dict(
        hidden_states=torch.randn(1, frames * rows * columns, 8),
        encoder_hidden_states=torch.randn(1, 12, 32),
        timestep=torch.tensor([500]),
        encoder_attention_mask=torch.ones(1, 12, dtype=torch.bool),
        num_frames=frames,
        height=rows,
        width=columns,
    )


def test_sparsify_refuses_ltx_with_coordinates_instead_of_a_grid() -> None:
    inputs = ltx_inputs() | dict(num_frames=None, height=None, width=None)
    inputs["video_coords"] = torch.zeros(1, 3, 432)
    model = tiny_ltx()
    with sparsify(model, Dense()), pytest.raises(ValueError, match=r"coordinates that are no grid"):
        model(**inputs)


def test_sparsify_leaves_perturbed_attention_of_ltx2_to_the_original_processor() -> None:
    model = zoo_ltx2.transformer(**zoo_ltx2.LATER)
    frames, rows, columns = 3, 8, 8
    draw = torch.Generator().manual_seed(5)
    inputs = dict(
        hidden_states=torch.randn(1, frames * rows * columns, 4, generator=draw),
        audio_hidden_states=torch.randn(1, 6, 8, generator=draw),
        encoder_hidden_states=torch.randn(1, 12, 16, generator=draw),
        audio_encoder_hidden_states=torch.randn(1, 12, 16, generator=draw),
        timestep=torch.tensor([500]),
        num_frames=frames,
        height=rows,
        width=columns,
        audio_num_frames=6,
        spatio_temporal_guidance_blocks=[1],
        return_dict=False,
    )

    def forward() -> torch.Tensor:
        with torch.no_grad(), model.cache_context("stg", step_index=1, num_inference_steps=4):
            return model(**inputs)[0]

    original = forward()
    everywhere = Schedule(dense_steps=0.0, dense_layers=0.0)
    with sparsify(model, Dense(), everywhere):
        assert torch.equal(forward(), original)
    with sparsify(model, SVG2(q_clusters=4, k_clusters=8, density=0.3), everywhere) as run:
        assert not torch.equal(forward(), original)
    assert [record.layer for record in run.stats().records] == [0]  # the other is perturbed
    inputs["num_frames"] = None
    with sparsify(model, Dense()), pytest.raises(ValueError, match="num_frames, height and width"):
        forward()


def test_sparsify_of_chronoedit_begins_anew_where_it_gives_up_frames() -> None:
    pipe, case = zoo_chronoedit.pipeline(), zoo_chronoedit.CASES[0]
    steps = dict(num_inference_steps=4, num_temporal_reasoning_steps=2)
    stock = case.run(pipe, **steps)
    with sparsify(pipe, Dense()):
        assert torch.equal(case.run(pipe, **steps), stock)
    sparse = SVG2(q_clusters=4, k_clusters=8, density=0.3, first_iterations=2)
    with sparsify(pipe, sparse, Schedule(dense_steps=0.5, dense_layers=0.0)) as run:
        case.run(pipe, **steps)
    assert run.stats().grid == (2, 8, 8)  # the first and the last frame
    assert {(r.step, r.method) for r in run.stats().records} == {(2, "SVG2"), (3, "SVG2")}


def test_sparsify_of_wan_animate_begins_each_segment_with_its_dense_steps() -> None:
    pipe, case = zoo_wan_animate.pipeline(), zoo_wan_animate.CASES[0]
    longer = dict(pose_video=zoo_wan.CLIP * 2, face_video=zoo_wan_animate.FACES * 2)
    seen = []
    with sparsify(pipe, SVG2(q_clusters=4, k_clusters=8), Schedule(dense_steps=0.5)) as run:
        begin = run._engine.begin_forward
        run._engine.begin_forward = lambda name, context: (
            seen.append((context.moment.step, context.moment.new_video)),
            begin(name, context),
        )
        case.run(pipe, **longer)
    assert seen.count((0, True)) == 3  # segments of 9 frames, a frame of each from the one before
    assert {r.method for r in run.stats().records if r.step == 0} == {"Dense"}


def test_sparsify_leaves_causal_attention_to_the_original_processor() -> None:
    model = like_wan(SkyReelsV2Transformer3DModel)
    inputs = tiny.forward_inputs()

    def forward() -> torch.Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=0, num_inference_steps=4):
            return model(**inputs)[0]

    with sparsify(model, SVG2(q_clusters=6, k_clusters=12), Schedule(dense_steps=0.0)) as run:
        model._set_ar_attention(3)  # what a pipeline does after the user has called sparsify
        causal = forward()
        assert run.stats().records == ()
    assert torch.equal(forward(), causal)
    with pytest.raises(ValueError, match="stays dense: it is causal, in blocks of 3 frames"):
        sparsify(model, Dense())


def test_sparsify_refuses_diffusion_forcing() -> None:
    model = like_wan(SkyReelsV2Transformer3DModel)
    inputs = tiny.forward_inputs() | dict(enable_diffusion_forcing=True)
    with sparsify(model, Dense()), pytest.raises(ValueError, match="each frame at a step of its"):
        model(**inputs)


@pytest.mark.parametrize("name", families.SKIPPED)
def test_family_of_the_reason_why_a_transformer_is_skipped_is_told(name: str) -> None:
    old = Version(diffusers.__version__) < Version("0.42")
    if old and not hasattr(diffusers, name):
        pytest.skip("this transformer came with diffusers 0.42")
    model = torch.nn.Module.__new__(getattr(diffusers, name))
    with pytest.raises(
        ValueError, match=re.escape(f"{name} stays dense: {families.SKIPPED[name]}")
    ):
        families.family_of(model)


def test_family_of_a_family_may_cover_what_is_skipped(registry: list[Family]) -> None:
    mine = replace(WAN, name="mine", transformers=("Kandinsky5Transformer3DModel",))
    families.register(mine)
    model = torch.nn.Module.__new__(diffusers.Kandinsky5Transformer3DModel)
    assert families.family_of(model) is mine


def test_family_of_a_transformer_nobody_knows_is_told_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"covers Linear; known families are wan: .*cosmos: "):
        families.family_of(torch.nn.Linear(1, 1))


def test_recipe_for_a_family_without_any_is_the_shared_one_with_a_note() -> None:
    recipe = recipe_for(tiny_ltx(), 75_600)
    assert isinstance(recipe.method, SVG2)
    assert (recipe.method.q_clusters, recipe.method.k_clusters) == (300, 1000)
    note = recipe_for(tiny_ltx(), 75_600, method="svg1").note  # a preset takes the place of svg2's
    assert "nearest published settings" in note


def test_family_of_the_page_about_models_is_what_the_registry_says() -> None:
    list_models = pytest.importorskip("list_models", reason="tools/ is not on the path")
    text = list_models.PAGE.read_text(encoding="utf-8")
    assert list_models.filled(text) == text, "run python tools/list_models.py"


def code_lines(path: Path) -> list[str]:
    """Return the lines of a module that are neither blank nor part of an import."""
    text = path.read_text(encoding="utf-8")
    imports = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), start=1)
    return [line.strip() for number, line in lines if line.strip() and number not in imports]


def test_family_of_no_two_families_share_a_run_of_more_than_six_lines() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted(Path(families.__file__).parent.glob("*.py")):
        lines = code_lines(path)
        for start in range(len(lines) - 6):
            run = tuple(lines[start : start + 7])
            assert seen.setdefault(run, path.name) == path.name, "\n".join((path.name, *run))


def test_register_refuses_a_name_or_transformer_that_is_taken(registry: list[Family]) -> None:
    before = families.known_families()
    for clash in (replace(WAN, transformers=("Other",)), replace(WAN, name="other")):
        with pytest.raises(ValueError, match=r"is already known as 'wan'"):
            families.register(clash)
    assert families.known_families() == before


def test_family_of_subclasses_belong_to_the_family_of_their_base() -> None:
    from diffusers import WanTransformer3DModel

    class Finetuned(WanTransformer3DModel):
        pass

    with torch.device("meta"):
        assert families.family_of(Finetuned(num_layers=1)) is WAN


def test_find_attentions_says_when_there_are_none(registry: list[Family]) -> None:
    registry[0] = replace(WAN, attentions=r"layers\.\d+\.attention")
    with pytest.raises(ValueError, match=r"no module matching .*layers"):
        sparsify(tiny.transformer(), Dense())


def longest_shared_run(first: Path, second: Path) -> list[str]:
    """Return the longest run of lines, blank ones apart, that stands in both files."""
    a, b = (
        [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in (first, second)
    )
    match = SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return a[match.a : match.a + match.size]


def family_files() -> list[Path]:
    folder = Path(families.__file__).parent
    return [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


def test_family_of_every_file_of_the_package_is_compared() -> None:
    names = {path.stem for path in family_files()}
    assert {"cogvideox", "cosmos", "hunyuan_video", "hunyuan_video15", "ltx", "wan"} <= names


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(*pair, id=" and ".join(path.stem for path in pair))
        for pair in combinations(family_files(), 2)
    ],
)
def test_family_of_no_family_file_repeats_another(first: Path, second: Path) -> None:
    shared = longest_shared_run(first, second)
    assert len(shared) <= 6, "\n".join(["write this once:", *shared])


FIRST_OF_THEIR_KIND = {"wan", "hunyuan_video", "cogvideox", "cosmos", "ltx", "ltx2"}


@pytest.mark.parametrize(
    "name",
    sorted({f.name for f in families.known_families()} - FIRST_OF_THEIR_KIND - {"skyreels_v2"}),
)
def test_a_further_family_takes_less_than_sixty_lines(name: str) -> None:
    source = Path(families.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) < 60
