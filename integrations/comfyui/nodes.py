"""The node, and how ComfyUI finds it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from svg_engines.comfyui import apply
from svg_engines.settings import MIN_TOKENS, PRESETS, Settings, layers


class SparseVideoGen(io.ComfyNode):
    """Make the self-attention of a video model sparse."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return what the node takes and gives."""
        return io.Schema(
            node_id="SparseVideoGen",
            display_name="Sparse VideoGen",
            category="model/patch",
            description="Makes self-attention of Wan 2.1, Wan 2.2 and HunyuanVideo sparse. Put it "
            "behind the model loader (and LoRA) and before the sampler; with two models, as Wan "
            "2.2 has, one for each. Whatever cannot be sparse stays as it was, and the console "
            "says once why.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS],
                    default="balanced",
                    tooltip="Method, density and dense steps that were measured.",
                ),
                io.Float.Input(
                    "density",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of attention to compute; 0 takes the preset's.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Dense before this share of sampling; below 0 the preset's.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Dense again after this share of sampling.",
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    tooltip="Blocks that stay dense, such as '0, 1, 38-39'. HunyuanVideo's single "
                    "blocks count on from its double blocks.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=MIN_TOKENS,
                    min=0,
                    max=1 << 20,
                    step=512,
                    tooltip="Shorter sequences stay dense: planning would cost more than it saves.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str = "balanced",
        density: float = 0.0,
        start_percent: float = -1.0,
        end_percent: float = 1.0,
        dense_blocks: str = "",
        min_tokens: int = MIN_TOKENS,
    ) -> io.NodeOutput:
        """Return a copy of the model whose attention is sparse."""
        settings = Settings(
            preset=preset,
            density=density or None,
            dense_steps=None if start_percent < 0.0 else start_percent,
            end=end_percent,
            dense_layers=layers(dense_blocks),
            min_tokens=min_tokens,
        )
        return io.NodeOutput(apply(model, settings))


class SparseVideoGenExtension(ComfyExtension):
    """What this pack brings."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return its one node."""
        return [SparseVideoGen]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    return SparseVideoGenExtension()
