"""What runs on the device: attention, its plan of a packed batch, and matrix products. These names are the room's face.

Code for one kind of device lies in gpu.py and cpu/: the model's files know neither.
"""

from flexbert.kernels.attention import Backend, attend, choose_backend, require_backend
from flexbert.kernels.cpu import factor, factor_, linear, product, softmax_
from flexbert.kernels.gpu import is_deterministic, set_deterministic
from flexbert.kernels.plan import AttentionPlan

__all__ = [
    "AttentionPlan",
    "Backend",
    "attend",
    "choose_backend",
    "factor",
    "factor_",
    "is_deterministic",
    "linear",
    "product",
    "require_backend",
    "set_deterministic",
    "softmax_",
]
