"""What the process that local workers are forked from imports first: from then on it is killed when its parent ends.

By itself it would notice only after all its other imports, seconds later, as it does where there is no Linux
(prctl(2), PR_SET_PDEATHSIG). Forked workers do not inherit it, they watch their parent themselves.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
# Where this process is started a second time, since it was killed, nobody says whose it is.
if "FLEXBERT_PREPARE_PID" in os.environ and os.getppid() != int(os.environ["FLEXBERT_PREPARE_PID"]):
    os._exit(1)  # the parent ended before that
