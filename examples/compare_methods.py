"""Compare two sparse methods with dense attention on one prompt, and write the page."""

from __future__ import annotations

import svg_models


def main() -> None:
    """Run `svg compare` from Python on a short clip of the embedded model."""
    comparison = svg_models.compare(
        "a blue circle moving up on a tiled sand background",
        methods=["svg2@0.3", "random@0.3"],
        frames=17,
        steps=8,
        seed=0,
    )
    for candidate in comparison.candidates:
        close, speed = candidate.similarity, candidate.speed
        line = f"{candidate.clip.method.title}: {close.mean_psnr:.1f} dB"
        print(line if speed is None else f"{line}, {speed.speedup:.2f}x faster")
    if comparison.no_speed:
        print("no speed:", comparison.no_speed)
    print("page:", comparison.save("comparison"))


if __name__ == "__main__":
    main()
