"""Start processes that work together, watch them, and leave none behind.

Knows nothing of video: what the processes do is a function that they are given.
"""

from svg_models.launch.group import Finished, Group, Place, finished
from svg_models.launch.rank import Rank

__all__ = ["Finished", "Group", "Place", "Rank", "finished"]
