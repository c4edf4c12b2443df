"""Make a diffusers pipeline sparse for one clip, look at what it did, and get it back as it was."""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import svg_models
from svg_models.video import write_video


def main() -> None:
    """Generate a clip with the model that ships in the package; any Wan pipeline works the same."""
    pipe = WanPipeline.from_pretrained(svg_models.embedded_path())
    with svg_models.sparsify(pipe) as run:
        frames = pipe(
            "a large red star moving right on a plain navy background",
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=10,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
    stats = run.stats()
    print(f"{len(stats.sparse_records)} sparse calls, mean density {stats.mean_density:.2f}")
    print("clip:", write_video(frames, "star.mp4", fps=16))
    print("page:", run.report("run.html"))


if __name__ == "__main__":
    main()
