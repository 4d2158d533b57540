"""k-means with clusters of equal size."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_EXACT = 1024  # points up to which every assignment is optimal
_ITERATIONS = 50


def balanced_clusters(
  points: Float[np.ndarray, "N D"], clusters: int, generator: np.random.Generator
) -> Int[np.ndarray, "N"]:
  """Returns the cluster of each point, in [0, C), such that all clusters have N / C points.

  As in Lloyd's algorithm, points are assigned to centres and centres become means, until nothing
  changes. The assignment minimises the sum of squared distances under equal sizes; for more than
  1,024 points it is greedy instead: points choose in the order of what a refusal would cost them.

  Args:
    points: The points. C must divide their number.
    clusters: The number of clusters C.
    generator: Draws the first centres among the points, as k-means++ does.
  """
  size = len(points) // clusters
  assert size * clusters == len(points), "clusters of equal size divide the points"
  centres = _first_centres(points, clusters, generator)
  label = np.full(len(points), -1)
  for _ in range(_ITERATIONS):
    distance = _squared_distances(points, centres)
    new = _assign(distance, size)
    if np.array_equal(new, label):
      break
    label = new
    centres = np.stack([points[label == c].mean(axis=0) for c in range(clusters)])
  return label


def _first_centres(points, clusters, generator) -> Float[np.ndarray, "C D"]:
  """Returns points that are far from each other, drawn as by k-means++."""
  chosen = [int(generator.integers(len(points)))]
  for _ in range(clusters - 1):
    nearest = _squared_distances(points, points[chosen]).min(axis=1)
    total = nearest.sum()
    # All points may be equal to a centre that is already chosen.
    odds = nearest / total if total > 0 else None
    chosen.append(int(generator.choice(len(points), p=odds)))
  return points[chosen]


def _squared_distances(points, centres) -> Float[np.ndarray, "N C"]:
  """Returns the squared distance of each point from each centre."""
  return np.maximum(
    (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1), 0
  )


def _assign(distance: Float[np.ndarray, "N C"], size: int) -> Int[np.ndarray, "N"]:
  """Returns the cluster of each point, with `size` points in each cluster."""
  count, clusters = distance.shape
  if count <= _EXACT:
    from scipy.optimize import linear_sum_assignment

    # Each cluster is `size` seats.
    _, seat = linear_sum_assignment(np.repeat(distance, size, axis=1))
    return seat // size
  label, room = np.full(count, -1), np.full(clusters, size)
  while (label < 0).any():
    waiting = np.flatnonzero(label < 0)
    open_distance = np.where(room > 0, distance[waiting], np.inf)
    order = np.sort(open_distance, axis=1)
    # The last open cluster takes all that are left.
    regret = order[:, 1] - order[:, 0] if (room > 0).sum() > 1 else -order[:, 0]
    for i in np.argsort(-regret, kind="stable"):
      wanted = int(open_distance[i].argmin())
      if room[wanted]:
        label[waiting[i]] = wanted
        room[wanted] -= 1
      else:
        # Somebody's first choice is full: all that wait look again at what is open.
        break
  return label
