"""The clip grammar, the renderer, and the checker that judges generated clips."""

import random

import numpy as np
import pytest
import torch
from training.checker import check_group, colour_map, name_direction, name_shape, parts
from training.clips import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Group,
    caption,
    sample_scene,
    scene_of,
    vocabulary,
)
from training.evaluate import agreement, contact_sheet, coverage, draw, held_out_scenes
from training.render import parameters, render, shape_distance

pytestmark = pytest.mark.usefixtures("one_thread")


def one(**changes):
    values = {
        "count": 1,
        "size": "",
        "texture": "plain",
        "colour": "red",
        "shape": "circle",
        "direction": "left",
    }
    return Group(**{**values, **changes})


def test_caption_says_every_attribute():
    group = one(count=2, size="small", texture="striped", shape="cross", turn="clockwise")
    scene = scene_of((group,), background="navy", pattern="tiled", camera="pans left")
    assert caption(scene) == (
        "two small striped red crosses moving left and turning clockwise"
        " on a tiled navy background, the camera pans left"
    )
    assert caption(scene_of((one(colour="orange", direction="still"),))).startswith(
        "an orange circle standing still on a plain grey background"
    )


def test_sample_scene_repeats_with_its_seed_and_avoids_held_out_combinations():
    assert sample_scene(5) == sample_scene(5)
    assert sample_scene(5) != sample_scene(6)
    groups = [group for seed in range(500) for group in sample_scene(seed).groups]
    assert not any(group.held_out for group in groups)
    assert {group.shape for group in groups} == set(SHAPES)
    assert {group.colour for group in groups} == set(COLOURS)


def test_held_out_scenes_are_all_held_out():
    scenes = held_out_scenes(32)
    assert all(group.held_out for scene in scenes for group in scene.groups)
    assert len({caption(scene) for scene in scenes}) == 32


def test_vocabulary_has_every_word_of_a_caption():
    known = set(vocabulary())
    for seed in range(300):
        text = caption(sample_scene(seed), say=random.Random(seed))
        assert set(text.replace(",", " ,").split()) <= known


def test_parameters_refuse_too_many_shapes():
    with pytest.raises(ValueError, match="1 to 4 shapes, got 6"):
        scene_of((one(count=3), one(count=3, colour="blue")))


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shape_distance_is_negative_inside_and_close_to_euclidean(shape):
    axis = torch.linspace(-1.6, 1.6, 161)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = shape_distance(x, y, torch.tensor(shape))
    assert 1.0 < (distance < 0).float().mean() * 3.2**2 < 3.2
    steps = distance.diff(dim=0).abs().max() / 0.02
    assert steps < 1.15  # a distance changes by at most the distance walked
    assert distance[0].min() > 0
    assert distance[:, 0].min() > 0


def test_render_makes_a_short_clip_the_middle_of_the_long_one():
    params = parameters([sample_scene(3)])
    long = render(params, num_frames=49, height=16, width=24)
    short = render(params, num_frames=9, height=16, width=24)
    torch.testing.assert_close(short, long[:, :, 20:29], atol=1e-4, rtol=0)
    assert long.shape == (1, 3, 49, 16, 24)
    assert long.abs().max() <= 1


def test_render_shows_part_of_the_frame_in_a_window():
    params = parameters([scene_of((one(direction="still"),))])
    whole = render(params, num_frames=1, height=64, width=64)
    corner = render(params, num_frames=1, height=32, width=32, window=(0.5, 0.25, 0.5))
    torch.testing.assert_close(corner, whole[..., 16:48, 32:], atol=1e-4, rtol=0)


def test_render_does_not_depend_on_the_batch():
    scenes = [sample_scene(seed) for seed in range(3)]
    together = render(parameters(scenes), num_frames=3, height=16, width=16)
    alone = render(parameters(scenes[1:2]), num_frames=3, height=16, width=16)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_check_group_confirms_true_clips():
    scenes = held_out_scenes(16)
    result = agreement(draw(scenes, frames=25, side=64), scenes)
    assert result["groups"] == 19
    assert result["clip"] == 1.0
    assert result["colour"] == result["direction"] == result["count"] == 1.0
    assert result["shape"] >= 0.9


def test_check_group_refuses_wrong_descriptions():
    truth = one(shape="star", size="large")
    frames = draw([scene_of((truth,))], frames=25, side=64)[0]
    assert check_group(frames, truth).all
    assert not check_group(frames, one(shape="star", colour="orange")).colour
    assert not check_group(frames, one(shape="star", direction="right")).direction
    assert not check_group(frames, one(shape="star", direction="still")).direction
    assert not check_group(frames, one(shape="star", count=2)).count
    assert not check_group(frames, one(shape="square")).shape


def test_check_group_sees_nothing_on_an_empty_frame():
    blank = np.full((8, 32, 32, 3), 0.4, np.float32)
    assert (colour_map(blank) == -1).all()
    verdict = check_group(blank, one())
    assert not verdict.colour
    assert not verdict.shape
    assert parts(np.zeros((8, 8), bool)) == []


@pytest.mark.parametrize("name", list(DIRECTIONS))
def test_name_direction_goes_by_the_centre(name):
    dx, dy = DIRECTIONS[name]
    masks = np.zeros((10, 40, 40), bool)
    for t in range(10):
        y, x = int(18 + 1.4 * dy * (t - 5)), int(18 + 1.4 * dx * (t - 5))
        masks[t, y : y + 5, x : x + 5] = True
    assert name_direction(masks) == name


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_name_shape_works_at_any_size_and_angle(index, angle):
    axis = torch.arange(48) + 0.5
    y, x = torch.meshgrid((axis - 20) / 14, (axis - 27) / 14, indexing="ij")
    c, s = np.cos(angle), np.sin(angle)
    mask = shape_distance(x * c + y * s, y * c - x * s, torch.tensor(index)) < 0
    assert name_shape(mask.numpy()) == SHAPES[index]


def test_parts_are_counted_by_touching_sides_and_specks_are_ignored():
    mask = np.zeros((20, 20), bool)
    mask[1:8, 1:8] = mask[8:15, 8:15] = True  # corners touch, sides do not
    mask[18, 1] = True
    assert [int(part.sum()) for part in parts(mask)] == [49, 49]


def test_coverage_is_the_fraction_of_keys_that_hold_the_mass():
    flat = coverage(torch.zeros(1, 50, 2, 8), torch.randn(1, 50, 2, 8))
    torch.testing.assert_close(flat, torch.full((2,), 0.9), atol=0.021, rtol=0)
    key = torch.eye(8).repeat(1, 1, 1).view(1, 8, 1, 8)
    peaked = coverage(100 * key, key)
    torch.testing.assert_close(peaked, torch.tensor([1 / 8]))


def test_contact_sheet_holds_every_clip():
    clips = np.random.default_rng(0).random((3, 5, 32, 32, 3), dtype=np.float32)
    methods = {"dense": clips, "SVG2": np.zeros_like(clips)}
    sheet = np.asarray(contact_sheet(methods, ["a", "b", "c"], shown=4, pixels=16))
    assert sheet.shape == (2 * (16 + 2 * 18 + 8) + 8, 2 * (40 + 4 * 16 + 8) + 8, 3)
    first = np.round(clips[0, 0].reshape(16, 2, 16, 2, 3).mean((1, 3)) * 255)
    assert np.abs(sheet[8 + 16 :, 8 + 40 :][:16, :16] - first).max() <= 1.5
    assert not sheet[8 + 16 + 18 :, 8 + 40 :][:16, :64].any()
