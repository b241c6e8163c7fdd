"""What runs on the device: attention, its plan of a packed batch, and matrix products. These names are the room's face.

Code for one kind of device lives in gpu.py and cpu/; the model files know neither.
"""

from flexbert.kernels.attention import Backend, attend, choose_backend, require_backend
from flexbert.kernels.plan import AttentionPlan

__all__ = ["AttentionPlan", "Backend", "attend", "choose_backend", "require_backend"]
