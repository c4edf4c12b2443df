"""Cluster scikit-learn's 1,797 handwritten digits, and find groups nobody labelled."""

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

import flash_kmeans as fk

digits = load_digits()
points = torch.tensor(digits.data, dtype=torch.float32)
if torch.cuda.is_available():
    points = points.cuda()

result = fk.kmeans(
    points,
    16,
    init="k-means++",
    tol=1e-6,
    max_iter=100,
    generator=torch.Generator().manual_seed(0),
)
score = adjusted_rand_score(digits.target, result.labels.cpu())
print(f"{result.n_iter} rounds, inertia {result.inertia:.0f}, agreement with digits {score:.2f}")

if len(sys.argv) > 1:  # a picture: one row per cluster, its mean first, then some of its members
    import matplotlib.pyplot as plt

    ends = result.sizes.cumsum(0).tolist()
    figure, axes = plt.subplots(8, 24, figsize=(12, 4.4), facecolor="white")
    for k in range(16):
        members = result.order[ends[k] - result.sizes[k] : ends[k]]  # sorted by label already
        tiles = torch.cat([result.centroids[k : k + 1], points[members[:10].long()]])
        for i in range(12):
            axis = axes[k // 2, 12 * (k % 2) + i]
            axis.set_axis_off()
            if i < len(tiles):
                shades = "magma_r" if i == 0 else "gray_r"
                axis.imshow(tiles[i].view(8, 8).cpu(), cmap=shades)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99, wspace=0.1, hspace=0.15)
    figure.savefig(sys.argv[1], dpi=110)
