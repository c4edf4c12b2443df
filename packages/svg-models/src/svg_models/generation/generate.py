"""Generate one clip, dense or sparse, on one GPU or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svg_models.generation.ranks import clip_maker, places_of
from svg_models.generation.request import GenerateRequest, takes
from svg_models.launch import Group

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip

__all__ = ["generate"]


@takes(GenerateRequest)
def generate(request: GenerateRequest) -> Clip:
    """Generate a clip.

    Takes the fields of `GenerateRequest` as keywords, the prompt also by position; what is missing
    or `None` comes from the model. diffusers' names `num_frames`, `num_inference_steps` and
    `guidance_scale` are understood.

        clip = generate("a red circle moving left", method="svg2@0.25", num_frames=49)
        clip.save("circle.mp4")

    With `gpus` each process has a GPU of its own; a script then calls this under
    `if __name__ == "__main__":`, as with any package that starts processes.

    Returns:
        The clip with its statistics.

    Raises:
        SettingError: if a setting is unknown, out of range, made void by another, or not a size of
            this model.
        ModelUnavailableError: if the model cannot be loaded.
        MachineError: if the machine is too small for it.
        LostRankError: if one of several processes (`gpus`) is gone.
        UnsupportedError: if `backend` cannot run here; it lists every backend's reason.
    """
    if request.gpus > 1:
        with Group(places_of(request), clip_maker) as group:
            clip: Clip = group.run(request.replace(progress=None), request.report)
            return clip
    from svg_models.generation.sample import clip_of, prepare

    return clip_of(request, *prepare(request, request.spec))
