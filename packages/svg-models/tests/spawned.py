"""What a spawned process does with the pipeline that it is sent."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

from svg_attention import SVG2, Schedule
from svg_models import sparsify


def generate_elsewhere(pipe: Any) -> tuple[Tensor, set[str], Tensor]:
    """Send a pipeline to a process of its own.

    Returns:
        The latents that it makes there as it arrives, the names of its processors, and the latents
        once it is sparse there.
    """
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(pipe, theirs))
    process.start()
    try:
        assert ours.poll(120), "nothing came back"
        video, processors, sparse = ours.recv()
        return torch.tensor(video), processors, torch.tensor(sparse)
    finally:
        process.join(30)
        process.kill()


def work(pipe: Any, answer: Any) -> None:
    torch.set_num_threads(1)
    video = tiny.generate(pipe)
    processors = {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks}
    method = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)
    with sparsify(pipe, method, Schedule(dense_steps=0.0, dense_layers=0.0)):
        sparse = tiny.generate(pipe)
    answer.send((video.tolist(), processors, sparse.tolist()))
