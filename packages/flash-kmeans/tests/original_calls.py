"""Run calls of `flash-kmeans` 0.3.1 and store what they return; as a script, once per library.

Arguments: the file to write. Whichever `flash_kmeans` comes first on the path is called. Its
kernels run in Triton's interpreter, posing as an H100, which needs `python -O`: the original
asserts that tensors are on a GPU.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton.runtime.interpreter as interpreter


def let_kernels_run() -> None:
    """Pose as an H100, and let the interpreter loop over run-time bounds with newer NumPy."""
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="NVIDIA H100", shared_memory_per_block_optin=232_448
    )
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def whole_clusterings(library: Any, results: dict[str, Any]) -> None:
    """Cluster with a start, by every metric, until rounds run out or nothing moves."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 16, generator=source)
    start = x[:, :4].clone()
    for name in ("batch_kmeans_Euclid", "batch_kmeans_Cosine", "batch_kmeans_Dot"):
        function = getattr(library, name)
        results[f"{name} positional"] = function(x, 4, 3, -1.0, start, False)
        results[f"{name} settled"] = function(
            x, n_clusters=4, max_iters=9, tol=1e-4, init_centroids=start
        )
        # A quarter of what the centroids move in the first rounds: stops in between.
        results[f"{name} early"] = function(x, 4, tol=0.7, init_centroids=start)
    native = importlib.import_module("flash_kmeans.torch_fallback")
    results["native"] = native.batch_kmeans_Euclid_torch_native(x, 4, 3, init_centroids=start)


def halves(library: Any, results: dict[str, Any]) -> None:
    """Label and move, whole and in parts."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 16, generator=source)
    start = x[:, :5].clone()
    start[:, 4] = 100
    labelling = importlib.import_module("flash_kmeans.assign_euclid_triton")
    moving = importlib.import_module("flash_kmeans.centroid_update_triton")
    native = importlib.import_module("flash_kmeans.torch_fallback")
    squares = x.square().sum(-1)
    results["labels"] = labelling.euclid_assign_triton(x, start, squares)
    results["dot labels"] = labelling.cosine_assign_triton(x, start)
    results["native labels"] = native.euclid_assign_torch_native_chunked(x, start, squares)
    out = torch.empty(2, 40, dtype=torch.int32)
    labelling.euclid_assign_triton(x, start, squares, out)
    results["out"] = labels = out
    results["means"] = library.triton_centroid_update_euclid(x, labels, start)
    results["sorted means"] = library.triton_centroid_update_sorted_euclid(x, labels, start)
    results["unit"] = moving.triton_centroid_update_cosine(x, labels, start)
    results["sorted unit"] = moving.triton_centroid_update_sorted_cosine(x, labels, start)
    results["loop"] = native.torch_loop_centroid_update(x, labels, start)
    results["loop unit"] = native.torch_loop_centroid_update(x, labels, start, mode="cosine")
    sums, counts = torch.zeros(2, 5, 16), torch.zeros(2, 5, dtype=torch.int32)
    for half in (slice(0, 17), slice(17, 40)):
        given = {"centroid_sums": sums, "centroid_cnts": counts}
        results[f"part {half.start}"] = library.triton_centroid_update_sorted_euclid(
            x[:, half], labels[:, half], start, calculate_new=half.stop == 40, **given
        )
    results |= {"sums": sums, "counts": counts}


def the_class(library: Any, results: dict[str, Any]) -> None:
    """Train and predict, batched and not; two clusters so far apart that any start finds them."""
    source = torch.Generator().manual_seed(2)
    x = torch.randn(30, 4, generator=source) + 100 * (torch.arange(30) % 2)[:, None]
    for name, points in (("single", x), ("batched", torch.stack([x, -x]))):
        for k in (1, 2):
            model = library.FlashKMeans(4, k, 25, 1e-8, False, 3, 7, 5, 1000, False, None, None)
            labels = model.fit_predict(points)
            results[f"class {name} {k}"] = {
                "labels": labels[..., :1] == labels,
                "predicted": model.predict(points) - labels,
                "centroids": model.centroids_b.sort(dim=1).values,
                "ids": model.cluster_ids_b.shape,
                "chains": model.fit(points) is model,
            }


def main(target: str) -> None:
    """Run everything and store it."""
    let_kernels_run()
    library = importlib.import_module("flash_kmeans")
    results: dict[str, Any] = {"file": library.__file__}
    whole_clusterings(library, results)
    halves(library, results)
    the_class(library, results)
    torch.save(results, target)


if __name__ == "__main__":
    main(sys.argv[1])
